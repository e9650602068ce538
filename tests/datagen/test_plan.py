"""Sources, survey and plan: what is found, where scenes are cut, what is filtered and why."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas
import pytest
from pydantic import ValidationError

from common.config import load_section
from common.errors import UserError
from common.lossless_clip import UnreadableVideo, decode, write_lossless
from common.seeding import derive_seed
from common.storage import StorageConfig
from datagen.config import ClipConfig, DatagenConfig, FilterConfig
from datagen.plan import make_plan
from datagen.sources import Source, find_sources
from datagen.survey.source_survey import SourceSurvey, Unreadable, Window, from_document, to_document
from datagen.survey.video_survey import survey, window_starts
from datagen.survey.window_reader import WindowReader
from tests.datagen.conftest import moving_picture

S3 = StorageConfig()


def test_folders_globs_lists_and_tables_find_the_same_videos(videos: Path, tmp_path: Path) -> None:
    files = sorted(str(path) for path in videos.rglob("*.mkv"))
    (tmp_path / "list.txt").write_text("# comment\n" + "\n".join(files) + "\n")
    table = pandas.DataFrame({"video": files, "caption": ["a cat", None, "", "a dog"]})
    table.to_csv(tmp_path / "table.csv")
    table.to_parquet(tmp_path / "table.parquet")
    expected = [str(videos / f"sub/video{index}.mkv") for index in range(4)]
    for text in (
        str(videos / "**/*.mkv"),
        *(str(tmp_path / name) for name in ("list.txt", "table.csv", "table.parquet")),
    ):
        assert [source.path for source in find_sources([text], S3)] == expected
    assert [source.id for source in find_sources([str(videos)], S3)] == [
        *(f"sub/video{index}.mkv" for index in range(4)),
        "text.mp4",
    ]
    for name in ("table.csv", "table.parquet"):
        captions = [source.caption for source in find_sources([str(tmp_path / name)], S3)]
        assert captions == ["a cat", None, None, "a dog"]


def test_bad_inputs_are_named(tmp_path: Path, videos: Path) -> None:
    with pytest.raises(UserError, match="no video found"):
        find_sources([str(tmp_path)], S3)
    with pytest.raises(UserError, match="does not exist"):
        find_sources([str(tmp_path / "nowhere")], S3)
    (tmp_path / "table.csv").write_text("name\na.mp4\n")
    with pytest.raises(UserError, match="no column of paths"):
        find_sources([str(tmp_path / "table.csv")], S3)
    for folder in ("a", "b"):
        write_lossless(tmp_path / folder / "same.mkv", moving_picture(1, 32, 32, 0))
    with pytest.raises(UserError, match="would both be called"):
        find_sources([str(tmp_path / "a"), str(tmp_path / "b")], S3)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def found_in(*inputs: Path) -> list[str]:
    return [source.id for source in find_sources([str(text) for text in inputs], S3)]


def test_videos_of_every_type_are_found(tmp_path: Path) -> None:
    names = [f"clip{suffix}" for suffix in (".m2ts", ".mts", ".vob", ".mxf", ".3gp", ".ogv", ".MTS", ".mp4")]
    touch(tmp_path, *names)
    assert found_in(tmp_path) == sorted(names)


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.mp4", "in/z/b.mp4", "in/z/deep/c.mp4", "target/d.mp4", "target/more/e.mp4", "f.mp4")
    for link, target in {
        "in/link": "target",
        "in/link2": "target",
        "in/a-link": "in/z",  # before the folder itself in the order of names
        "in/z/loop": "in",
        "in/z/above": ".",
        "target/back": "in/z/deep",
        "in/broken": "nowhere",
        "in/itself": "in/itself",
    }.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    (tmp_path / "in/f.mp4").symlink_to(tmp_path / "f.mp4")
    expected = ["a.mp4", "f.mp4", "link/d.mp4", "link/more/e.mp4", "z/b.mp4", "z/deep/c.mp4"]
    assert found_in(tmp_path / "in") == expected
    (tmp_path / "input").symlink_to(tmp_path / "in")
    assert found_in(tmp_path / "input") == expected


def test_apple_double_files_are_no_sources(tmp_path: Path) -> None:
    names = [f"video{index:02}.mp4" for index in range(12)]
    twins = [f"._{name}" for name in names]
    touch(tmp_path / "in", *names, *twins)
    assert found_in(tmp_path / "in") == found_in(tmp_path / "in/*.mp4") == names
    (tmp_path / "list.txt").write_text("".join(f"in/{name}\n" for name in names + twins))
    (tmp_path / "table.csv").write_text("video\n" + "".join(f"in/{name}\n" for name in names + twins))
    for text in ("list.txt", "table.csv"):
        assert found_in(tmp_path / text) == [f"in/{name}" for name in names]


def test_files_of_other_types_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path, "a.mp4", "a.srt", "b/b.JPG", "b/c.jpg", "README", ".DS_Store", "._a.mp4")
    assert found_in(tmp_path) == ["a.mp4"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{tmp_path}: 6 files of other types left out (2 .jpg, 2 without suffix, 1 ._*, 1 .srt)"
    touch(tmp_path / "one", "a.mp4", "a.srt")
    found_in(tmp_path / "one")
    assert "1 file of other types left out (1 .srt)" in capsys.readouterr().err
    touch(tmp_path / "types", "a.mp4", *(f"a.{index}" for index in range(6)))
    found_in(tmp_path / "types")
    assert "6 files of other types left out (1 .0, 1 .1, 1 .2, 1 .3, 1 .4, …)" in capsys.readouterr().err
    touch(tmp_path / "clean", "a.mp4")
    found_in(tmp_path / "clean")
    assert capsys.readouterr().err == ""
    touch(tmp_path / "pictures", "a.jpg")
    with pytest.raises(UserError, match=r"no video found .*; 1 file of other types left out \(1 \.jpg\)"):
        found_in(tmp_path / "pictures")


def test_a_list_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfone.mp4\r\nz\xc3\xbcrich.mp4\r\n")
    assert found_in(tmp_path / "list.txt") == ["one.mp4", "zürich.mp4"]
    (tmp_path / "comment.txt").write_bytes(b"\xef\xbb\xbf# of May\none.mp4\n")
    assert found_in(tmp_path / "comment.txt") == ["one.mp4"]
    (tmp_path / "table.csv").write_bytes(b"\xef\xbb\xbfvideo,caption\none.mp4,a cat\n")
    (source,) = find_sources([str(tmp_path / "table.csv")], S3)
    assert (source.id, source.caption) == ("one.mp4", "a cat")
    (tmp_path / "wide.txt").write_text("one.mp4\n", encoding="utf-16")
    with pytest.raises(UserError, match=r"wide\.txt is no UTF-8 text \(byte 0\); save it as UTF-8"):
        found_in(tmp_path / "wide.txt")


def test_windows_do_not_cross_scenes(tmp_path: Path) -> None:
    soft = [cv2.GaussianBlur(picture, (0, 0), 6) for picture in moving_picture(42, 96, 128, 1)]
    video = np.stack([*soft[:20], *(picture // 4 for picture in soft[20:])])
    path = tmp_path / "video.mkv"
    write_lossless(path, video)
    source = Source("video.mkv", str(path))
    found = survey(source, str(path), ClipConfig(frames=9, crop=(64, 64)))
    assert found.frames == 42 and found.cuts == (20,)
    assert [window.start for window in found.windows] == [0, 9, 20, 29]
    uncut = survey(source, str(path), ClipConfig(frames=9, crop=(64, 64), respect_scenes=False))
    assert [window.start for window in uncut.windows] == [0, 9, 18, 27]
    assert from_document(json.loads(json.dumps(to_document(found))), source) == found
    unreadable = Unreadable(source, "not a video")
    assert from_document(json.loads(json.dumps(to_document(unreadable))), source) == unreadable


def test_window_starts() -> None:
    assert window_starts(27, [], 9, None) == [0, 9, 18]
    assert window_starts(27, [], 9, 5) == [0, 5, 10, 15]
    assert window_starts(8, [], 9, None) == []


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_seeking_gives_the_frames_that_decoding_from_the_start_gives(tmp_path: Path, suffix: str) -> None:
    import av

    path = tmp_path / f"long{suffix}"
    with av.open(str(path), "w") as container:  # B-frames, and a key frame every 12
        stream = container.add_stream("libx264", rate=25, options={"g": "12", "bf": "3"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for picture in moving_picture(50, 64, 96, 3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    clip = ClipConfig(frames=5, crop=(32, 32), respect_scenes=False)
    found = survey(Source("long", str(path)), str(path), clip)
    everything = np.stack(list(decode(str(path), path.name)))
    time_stamps = {window.start: window.pts for window in found.windows}
    again, far, overlapping = [20, 20], [45, 0, 35, 5], [10, 12, 16, 11]
    for order in (sorted(time_stamps), again, far, overlapping):
        reader = WindowReader()
        for start in order:
            clip = reader.read(str(path), lambda: str(path), "long", start, time_stamps.get(start), 5)
            np.testing.assert_array_equal(clip, everything[start : start + 5], err_msg=f"{order} at {start}")
    reader = WindowReader()
    for _ in range(2):
        with pytest.raises(UnreadableVideo, match="ends 3 frames before"):
            reader.read(str(path), lambda: str(path), "long", 48, None, 5)
        assert len(reader.read(str(path), lambda: str(path), "long", 44, None, 5)) == 5


def surveyed(name: str, **changes: Any) -> SourceSurvey:
    """A survey of one window that passes every filter, with changes to the survey or its window."""
    window = Window(
        start=0,
        pts=0,
        luma=100.0,
        contrast=40.0,
        motion=2.0,
        sharpness=100.0,
        novelty=20.0,
        hashes=tuple(f"{derive_seed(name, index):016x}" for index in range(3)),
    )
    of_window = {field: value for field, value in changes.items() if hasattr(window, field)}
    survey = SourceSurvey(
        Source(name, f"/somewhere/{name}"),
        width=200,
        height=100,
        frames=20,
        frames_per_second=25.0,
        content=f"of {name}",
        cuts=(),
        windows=(replace(window, **of_window),),
    )
    return replace(survey, **{field: value for field, value in changes.items() if field not in of_window})


CONFIG = DatagenConfig(clip=ClipConfig(frames=9, crop=(64, 64)), samples_per_shard=2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"luma": 1.0}, "black: luma 1.0 is below 4.0"),
        ({"contrast": 1.0}, "empty: contrast"),
        ({"motion": 0.0}, "static: motion"),
        ({"sharpness": 1.0}, "blurred: sharpness"),
        ({"novelty": 0.1}, "repeated: novelty 0.1 is below 0.7"),
        ({"height": 60}, "resolution 200x60 is below 64x64"),
        ({"frames": 8}, "length 8 frames"),
        ({"windows": ()}, "no scene"),
    ],
)
def test_rejections_are_recorded_with_their_reason(change: dict[str, Any], reason: str) -> None:
    plan = make_plan([surveyed("good"), surveyed("bad", **change)], CONFIG, {})
    assert [sample.source for sample in plan.samples] == ["good"]
    assert [line["source"] for line in plan.rejected] == ["bad"]
    assert reason in plan.rejected[0]["reason"]


def test_duplicates_of_other_sources_are_found_within_the_distance() -> None:
    hashes = ("0123456789abcdef", "fedcba9876543210", "00ff00ff00ff00ff")
    near = tuple(f"{int(text, 16) ^ 0b1001:016x}" for text in hashes)  # two bits
    far = (hashes[0], f"{int(hashes[1], 16) ^ 0xFF00FF:016x}", hashes[2])
    surveys = [surveyed("a", hashes=hashes), surveyed("b", hashes=near), surveyed("c", hashes=far)]
    plan = make_plan(surveys, CONFIG, {})
    assert sorted(sample.source for sample in plan.samples) == ["a", "c"]
    assert plan.rejected[0]["reason"] == "duplicate of a at frame 0"
    kept = CONFIG.model_copy(update={"filters": FilterConfig(duplicate_distance=0)})
    assert len(make_plan(surveys, kept, {}).samples) == 3


def test_the_same_video_twice_is_noticed_without_hashes() -> None:
    surveys = [surveyed(name, content="of one", hashes=(None, None, None)) for name in ("in/a", "other/a")]
    plan = make_plan(surveys, CONFIG, {})
    assert [sample.source for sample in plan.samples] == ["in/a"]
    assert plan.rejected == [{"source": "other/a", "reason": "duplicate of in/a: the same video"}]
    kept = CONFIG.model_copy(update={"filters": FilterConfig(duplicate_distance=0)})
    assert len(make_plan(surveys, kept, {}).samples) == 2


def test_the_plan_is_a_function_of_survey_and_configuration() -> None:
    surveys = [surveyed(str(index)) for index in range(7)]
    plan = make_plan(surveys, CONFIG, {})
    moved = [replace(survey, source=Source(survey.source.id, "/elsewhere")) for survey in surveys]
    assert make_plan(moved, CONFIG, {}).hash == plan.hash  # where the inputs are mounted does not matter
    for changed in ({"seed": 1}, {"variants": 2}, {"samples_per_shard": 3}):
        assert make_plan(surveys, CONFIG.model_copy(update=changed), {}).hash != plan.hash
    assert make_plan(surveys, CONFIG, {"vae": "other"}).hash != plan.hash
    assert [len(shard) for shard in plan.shards()] == [2, 2, 2, 1]


def test_neighbouring_windows_stay_together_and_sources_are_mixed() -> None:
    surveys = []
    for source in "abc":
        (window,) = surveyed(source).windows
        surveys.append(surveyed(source, windows=[replace(window, start=9 * index) for index in range(24)]))
    config = CONFIG.model_copy(update={"windows_together": 4})
    samples = make_plan(surveys, config, {}).samples
    stretches = [samples[first : first + 4] for first in range(0, len(samples), 4)]
    assert len(samples) == 72
    for stretch in stretches:
        assert len({sample.source for sample in stretch}) == 1
        assert [sample.start - stretch[0].start for sample in stretch] == [0, 9, 18, 27]
    changes = sum(before[0].source != after[0].source for before, after in pairwise(stretches))
    assert changes > 3


def test_crops_and_variants() -> None:
    clip = CONFIG.clip.model_copy(update={"crops_per_window": 3})
    plan = make_plan([surveyed("a")], CONFIG.model_copy(update={"clip": clip, "variants": 2}), {})
    assert len({sample.key for sample in plan.samples}) == len({sample.seed for sample in plan.samples}) == 6
    assert len({sample.crop for sample in plan.samples}) == len({sample.clip for sample in plan.samples}) == 3
    for top, left, height, width in (sample.crop for sample in plan.samples):
        assert 0 <= top <= 100 - height and 0 <= left <= 200 - width
    center = CONFIG.clip.model_copy(update={"crop_position": "center"})
    (sample,) = make_plan([surveyed("a")], CONFIG.model_copy(update={"clip": center}), {}).samples
    assert sample.crop == (18, 68, 64, 64)


@pytest.mark.parametrize("values", [{"frames": 8}, {"crop": (64, 60)}])
def test_impossible_clips_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="must be"):
        ClipConfig(**values)


def test_the_old_section_for_s3_is_refused_with_the_new_one(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("datagen: {storage: {endpoint_url: 'http://localhost'}}")
    with pytest.raises(UserError, match=r"datagen\.storage is now called storage, a section of its own"):
        load_section(tmp_path / "old.yaml", "datagen", DatagenConfig)

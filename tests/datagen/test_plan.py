"""Windows and plan: what is decoded, what is filtered and why, in which order it comes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from common.config import load_section
from common.errors import UserError
from common.lossless_clip import UnreadableVideo, decode
from common.seeding import derive_seed
from datagen.config import ClipConfig, DatagenConfig, FilterConfig
from datagen.plan import make_plan
from datagen.sources import Source
from datagen.survey.source_survey import SourceSurvey, Window
from datagen.survey.video_survey import survey
from datagen.survey.window_reader import WindowReader
from tests.datagen.conftest import moving_picture


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

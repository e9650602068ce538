"""Folders, lists and names as people have them: what is a source of datagen, and what is left out."""

from __future__ import annotations

import os
from pathlib import Path

import pandas
import pytest

from common.errors import UserError
from common.lossless_clip import write_lossless
from common.storage import StorageConfig, open_folder
from datagen.config import DatagenConfig
from datagen.sources import find_sources
from datagen.survey.decoder_process import survey_isolated
from datagen.survey.source_survey import Unreadable
from datagen.survey.survey_cache import survey_all
from tests.datagen.conftest import moving_picture
from tests.datagen.inputs.conftest import H264, Make, picture

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


def test_a_linked_folder_and_a_transport_stream_are_films_and_a_twin_is_none(make: Make, tmp_path: Path) -> None:
    base = make("sources/base.mp4", *picture(2, "64x48"), *H264)
    upright = make("target/r0.mp4", *picture(1), *H264)
    make("sources/cam.m2ts", "-i", str(upright), "-c", "copy", "-f", "mpegts")
    (tmp_path / "sources/link").symlink_to("../target")
    (tmp_path / "sources/._base.mp4").write_bytes(b"\0\5\x16\7\0\2\0\0" + bytes(4096))
    found = find_sources([str(tmp_path / "sources")], S3)
    surveys = [survey_isolated(source, DatagenConfig(), S3) for source in found]
    told = [(of.source.id, of.width, of.height, of.frames) for of in surveys]
    assert told == [("base.mp4", 64, 48, 50), ("cam.m2ts", 192, 144, 25), ("link/r0.mp4", 192, 144, 25)]
    assert found[0].path == str(base)


def test_names_that_mean_something_to_ffmpeg_or_a_shell(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative name with a colon is no protocol, and brackets of a file that is there are no pattern."""
    base = make("base.mp4", *picture(1, "64x48"), *H264)
    names = ["2026-01-02T12:30:00.mp4", "Season #1/what?.mp4", "clip [1080p].mp4"]
    monkeypatch.chdir(tmp_path)
    for name in names:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(base.read_bytes())
        (source,) = find_sources([name], S3)
        assert survey_isolated(source, DatagenConfig(), S3).frames == 25, name
    assert {"base.mp4", *names} == set(found_in(Path(".")))


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
    touch(tmp_path / "others", "a.mp4", "song.mp3", "animated.webp")
    assert found_in(tmp_path / "others") == ["a.mp4"]
    assert "2 files of other types left out (1 .mp3, 1 .webp)" in capsys.readouterr().err
    touch(tmp_path / "pictures", "a.jpg")
    with pytest.raises(UserError, match=r"no video found .*; 1 file of other types left out \(1 \.jpg\)"):
        found_in(tmp_path / "pictures")


def test_captions_lie_beside_the_videos_where_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path, "a.mp4", "b/c.mp4", "d.mp4", "b/e.mp4")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa cat \n")
    (tmp_path / "b/c.txt").write_text("Hund im Schn\u00e4e\n", encoding="utf-8")
    (tmp_path / "b/e.txt").write_text("\n")

    def captions(text: Path, suffix: str | None) -> list[str | None]:
        return [source.caption for source in find_sources([str(text)], S3, suffix)]

    beside = ["a cat", "Hund im Schn\u00e4e", None, None]
    assert captions(tmp_path, ".txt") == beside and capsys.readouterr().err == ""
    assert captions(tmp_path, None) == [None] * 4
    assert "3 files of other types left out (3 .txt)" in capsys.readouterr().err
    (tmp_path / "table.csv").write_text("video,caption\na.mp4,a dog\nb/c.mp4,\nb/e.mp4,\nd.mp4,\n")
    assert captions(tmp_path / "table.csv", ".txt") == ["a dog", *beside[1:]]
    (tmp_path / "d.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"d\.txt is no UTF-8 text \(byte 3\); save it as UTF-8"):
        captions(tmp_path, ".txt")


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


def test_a_name_that_is_no_utf8_is_quarantined(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.mp4")).touch()
    (source,) = find_sources([str(tmp_path)], S3)
    assert source.id == "caf\\xe9.mp4"
    (found,) = survey_all(open_folder(tmp_path / "out"), [source], DatagenConfig(), S3, pytest.fail)
    assert isinstance(found, Unreadable) and "its name is no UTF-8" in found.reason

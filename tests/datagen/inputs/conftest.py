"""Videos as people have them, made by the bundled FFmpeg."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import imageio_ffmpeg
import pytest

from datagen.config import ClipConfig
from datagen.sources import Source
from datagen.survey.source_survey import SourceSurvey
from datagen.survey.video_survey import survey

Make = Callable[..., Path]
H264 = ("-c:v", "libx264", "-qp", "4")


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make("name.mp4", *options)` writes a video into the test's folder; options that name a file there work."""

    def run(name: str, *options: str) -> Path:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        quiet = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-nostdin"]
        subprocess.run([*quiet, *options, f"file:{name}"], cwd=tmp_path, check=True)
        return tmp_path / name

    return run


def picture(seconds: float, size: str = "192x144", rate: int = 25) -> tuple[str, ...]:
    return lavfi(f"testsrc2=s={size}:r={rate}:d={seconds}")


def lavfi(*sources: str) -> tuple[str, ...]:
    return tuple(word for source in sources for word in ("-f", "lavfi", "-i", source))


def surveyed(path: Path, **clip: object) -> SourceSurvey:
    return survey(Source(id=path.name, path=str(path)), str(path), ClipConfig(**clip))  # type: ignore[arg-type]

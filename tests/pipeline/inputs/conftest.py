"""Videos as people have them, made by the bundled FFmpeg alone, whichever one the project reads and writes with."""

import subprocess
from pathlib import Path

import av
import imageio_ffmpeg
import pytest


@pytest.fixture
def make(tmp_path):
    """`make("name.mp4", *options)` writes a video into the test's folder; options that name a file there work."""

    def run(name: str, *options: str) -> Path:
        quiet = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-nostdin"]
        subprocess.run([*quiet, *options, f"file:{name}"], cwd=tmp_path, check=True)
        return tmp_path / name

    return run


@pytest.fixture
def base(make):
    """2 s of 64x48 at 25 frames/s with a tone of 3 s."""
    return make("base.mp4", *picture(2), *tone(3), "-c:v", "libx264", "-c:a", "aac")


def picture(seconds: float, size: str = "64x48", rate: int = 25) -> tuple[str, ...]:
    return ("-f", "lavfi", "-i", f"testsrc2=s={size}:r={rate}:d={seconds}")


def tone(seconds: float) -> tuple[str, ...]:
    return ("-f", "lavfi", "-i", f"sine=d={seconds}")


def frame_times(path: Path) -> list[float]:
    """Seconds of each frame, in the order of showing."""
    with av.open(f"file:{path}") as container:
        stream = container.streams.video[0]
        return sorted(
            float(packet.pts * stream.time_base) for packet in container.demux(stream) if packet.pts is not None
        )


def sound_start(path: Path) -> float:
    """Seconds of the first sound packet."""
    with av.open(f"file:{path}") as container:
        stream = container.streams.audio[0]
        return min(float(packet.pts * stream.time_base) for packet in container.demux(stream) if packet.pts is not None)


def tracks(path: Path) -> list[tuple[str, str]]:
    """(type, codec) of each stream, without what holds chapters."""
    with av.open(f"file:{path}") as container:
        return [(stream.type, stream.codec_context.name) for stream in container.streams if stream.codec_context]

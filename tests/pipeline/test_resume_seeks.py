"""A resumed job seeks: what lies before the place is not decoded again, and the frames are the same."""

import os
import subprocess

import av
import numpy as np
import pytest

from common.video_probe import ffmpeg_binary
from common.video_reader import Mark, VideoReader, read_video
from common.video_writer import VideoWriter

SCENE = ("-f", "lavfi", "-i", "testsrc2=s=64x48:r=25:d=6", "-vf", "noise=alls=20:allf=t")
#: frames in a group of pictures
GROUP = 25


def make(path, *options):
    subprocess.run([ffmpeg_binary(), "-v", "error", *SCENE, *options, str(path)], check=True)
    return path


def destroy(path, first, last):
    """Zero the packets of the frames first…last, and leave the file's size and times as they are."""
    with av.open(str(path)) as container:
        packets = sorted((packet.pos, packet.size) for packet in container.demux(video=0) if packet.size)
    content, times = bytearray(path.read_bytes()), path.stat()
    for place, size in packets[first : last + 1]:
        content[place : place + size] = bytes(size)
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def mark_of(path, number, **options):
    """Of a frame of the video, and all frames from it on."""
    reader = VideoReader(path, **options)
    frames = np.stack(list(reader))
    checksum = reader.checksum(number)
    assert checksum is not None and reader.pts[number] is not None
    return Mark(reader.pts[number], reader.time_base, checksum), frames[number:]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("closed.mp4", ("-c:v", "libx264", "-g", "25")),
        ("open.mkv", ("-c:v", "libx264", "-g", "25", "-x264-params", "open-gop=1")),
        ("refresh.mp4", ("-c:v", "libx264", "-g", "25", "-x264-params", "intra-refresh=1")),
        ("stream.ts", ("-c:v", "libx264", "-g", "25")),
        ("old.avi", ("-c:v", "mpeg4", "-g", "25", "-bf", "2")),
        ("vp9.webm", ("-c:v", "libvpx-vp9", "-g", "25", "-deadline", "realtime", "-cpu-used", "8")),
        ("late.mkv", ("-c:v", "libx264", "-g", "25", "-output_ts_offset", "5")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("deinterlace", ["off", "bwdif"])
def test_frames_are_the_same_in_any_container(tmp_path, name, options, deinterlace):
    """Also where seeking lands badly, and all is decoded after all."""
    path = make(tmp_path / name, *options)
    mark, wanted = mark_of(path, 110, deinterlace=deinterlace)
    reader = VideoReader(path, 110, deinterlace=deinterlace, mark=mark)
    assert np.array_equal(np.stack(list(reader)), wanted)
    assert len(reader.pts) == 40 and reader.pts[0] == mark.pts and not reader.errors
    part = VideoReader(path, 110, 7, deinterlace=deinterlace, mark=mark)
    assert np.array_equal(np.stack(list(part)), wanted[:7])


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_what_lies_before_is_not_decoded(tmp_path, suffix):
    path = make(tmp_path / f"in.{suffix}", "-c:v", "libx264", "-g", str(GROUP), "-bf", "0")
    mark, wanted = mark_of(path, 110)
    destroy(path, GROUP, 2 * GROUP)
    reader = VideoReader(path, 110, mark=mark)
    assert np.array_equal(np.stack(list(reader)), wanted) and not reader.errors
    whole = VideoReader(path, 110)
    assert len(list(whole)) <= 40 and whole.errors, "decoded from the beginning, the damage is met"


def test_another_frame_at_the_mark_is_not_believed(tmp_path):
    """As where a file's times say nothing: then all is decoded, and frames are counted."""
    path = make(tmp_path / "in.mp4", "-c:v", "libx264", "-g", str(GROUP))
    mark, wanted = mark_of(path, 110)
    for wrong in (Mark(mark.pts, mark.time_base, mark.checksum ^ 1), Mark(mark.pts + 1, mark.time_base, mark.checksum)):
        assert np.array_equal(np.stack(list(VideoReader(path, 110, mark=wrong))), wanted)


def test_a_resumed_job_seeks(upscale, tmp_path, monkeypatch):
    """Interrupted after two parts. What was read then is destroyed, and nobody notices."""
    source, output, whole = (tmp_path / name for name in ("in.mp4", "out.mkv", "whole.mkv"))
    make(source, "-c:v", "libx264", "-g", str(GROUP), "-bf", "0")
    options = ("--bicubic", "--part-frames", 60, "--scale", 1, "--lossless")
    assert upscale(source, whole, *options).returncode == 0
    write, written = VideoWriter.write, []

    def interrupted(self, clip):
        written.append(len(clip))
        if len(written) == 135:
            raise KeyboardInterrupt
        write(self, clip)

    with monkeypatch.context() as patched:
        patched.setattr(VideoWriter, "write", interrupted)
        assert upscale(source, output, *options).returncode == 130
    destroy(source, GROUP, 2 * GROUP)
    done = upscale(source, output, *options)
    assert done.returncode == 0 and "resuming after 120 frames" in done.stderr, done.stderr
    assert np.array_equal(read_video(output), read_video(whole))

"""Whether a video that does not say so is interlaced, by its pixels: FFmpeg's idet counts frames that comb."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Literal

from common.video_probe import VideoInfo, ffmpeg_binary, url

#: frames that are looked at, at the beginning and in the middle [ours]
FRAMES = 60
#: of them, that comb at least, and their share of those that idet decides on: fine patterns that move comb too [ours]
FEWEST, SHARE = 15, 0.95
#: lines of the smallest and the largest interlaced video there is, the former with black bars cut off
SMALLEST, LARGEST = 400, 1088

_COUNTS = re.compile(r"Single frame detection: TFF: *(\d+) BFF: *(\d+) Progressive: *(\d+)")


def unmarked_field_order(path: Path, info: VideoInfo) -> Literal["tff", "bff"] | None:
    """The field that comes first, where frames comb; None for progressive video and one that says how it is."""
    if info.interlaced or not info.chroma or not SMALLEST <= info.height <= LARGEST:
        return None
    places = [0.0] if not info.duration_s else [0.0, info.duration_s / 2]
    counts = [0, 0, 0]
    for place in places:
        command = [ffmpeg_binary(), "-hide_banner", "-nostdin", "-nostats", "-ss", f"{place:.3f}", "-i", url(path)]
        command += ["-map", f"0:{info.stream_index}", "-frames:v", str(FRAMES), "-vf", "idet", "-f", "null", "-"]
        log = subprocess.run(command, stderr=subprocess.PIPE, check=False).stderr.decode(errors="replace")
        if found := _COUNTS.findall(log):
            counts = [count + int(more) for count, more in zip(counts, found[-1], strict=True)]
    tff, bff, _ = counts
    if max(tff, bff) < max(FEWEST, SHARE * sum(counts)):
        return None
    return "tff" if tff > bff else "bff"

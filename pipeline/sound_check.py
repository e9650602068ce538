"""Damage in sound: what is copied is decoded once, since a copy says nothing."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from common.video_probe import ffmpeg_binary, url
from pipeline.container import TrackPlan

_ERROR = re.compile(r"^(?:\[[^\]]* @ 0x[0-9a-f]+\] )*\[(?:error|fatal|panic)\] ?(.*)")


def sound_damage(source: Path, tracks: TrackPlan) -> list[str]:
    """One line for each kept sound track that FFmpeg cannot decode without an error."""
    damage = []
    for track in tracks.kept:
        if track.kind != "audio":
            continue
        command = [ffmpeg_binary(), "-hide_banner", "-nostdin", "-nostats", "-loglevel", "repeat+level+error"]
        command += ["-i", url(source), "-map", f"0:{track.index}", "-f", "null", "-"]
        log = subprocess.run(command, stderr=subprocess.PIPE, check=False).stderr.decode(errors="replace")
        errors = [found[1].strip() for line in log.splitlines() if (found := _ERROR.match(line))]
        if errors:
            damage.append(
                f"sound of track {track.index} is damaged, {len(errors)} errors; the first: {errors[0][:300]}"
            )
    return damage

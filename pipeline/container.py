"""The output file: parts put one after the other with the source's times, beside the source's other tracks.

`plan_tracks` says before the first frame what becomes of each track; `join` gives every frame its time; `write_output`
puts video, sound, subtitles, chapters and titles into one file.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
from av.error import FFmpegError

from common.atomic import atomic_file
from common.errors import UserError
from common.video_probe import ffmpeg_binary, first_video, url
from common.video_writer import ffmpeg_reason

_MP4_AUDIO = frozenset({"aac", "mp3", "mp3float", "ac3", "eac3", "alac", "opus", "flac"})
_PCM = frozenset(f"pcm_{kind}" for kind in ("s16le", "s16be", "s24le", "s24be", "s32le", "s32be", "f32le", "f32be"))
#: sound that a container takes unchanged; any other is encoded anew
COPIED_AUDIO: dict[str, frozenset[str]] = {
    ".mp4": _MP4_AUDIO,
    ".m4v": frozenset({"aac", "alac", "ac3"}),
    ".mov": frozenset({"aac", "mp3", "mp3float", "ac3", "eac3", "alac"}) | _PCM,
    ".mkv": (_MP4_AUDIO | _PCM | {"vorbis", "dca", "truehd", "mp2"}) - {"pcm_f32be"},
    ".webm": frozenset({"opus", "vorbis"}),
    ".avi": frozenset({"mp3", "mp3float", "ac3", "mp2", "pcm_s16le"}),
}
#: what other sound becomes
NEW_AUDIO = {".avi": "libmp3lame", ".webm": "libopus"}
#: channel layouts that the encoders take; others are mixed to the nearest
LAYOUTS = {
    "libopus": "aformat=channel_layouts=mono|stereo|3.0|quad|5.0|5.1|6.1|7.1",
    "libmp3lame": "aformat=channel_layouts=mono|stereo",
    "aac": "aformat=channel_layouts=mono|stereo|3.0|4.0|5.0|5.1|7.1",
}
#: MP4 takes no MP3 of a lower rate, samples/s
MP3_IN_MP4_HZ = 16000
#: subtitles that Matroska takes unchanged
MATROSKA_SUBTITLES = frozenset(
    {"subrip", "srt", "ass", "ssa", "webvtt", "hdmv_pgs_subtitle", "dvd_subtitle", "dvb_subtitle"}
)
TEXT_SUBTITLES = frozenset({"subrip", "srt", "ass", "ssa", "mov_text", "webvtt", "text"})
#: what text subtitles become, where a container does not take each as it is
NEW_SUBTITLES = {".mp4": "mov_text", ".m4v": "mov_text", ".mov": "mov_text", ".webm": "webvtt"}
#: containers that say at which time code they start: a track in MP4 and MOV, a tag in Matroska
TIMECODE_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm")
#: time stamps that go back by more than this start anew, seconds
RESTART_S = 1
#: times that are so close to a constant rate have it: Matroska rounds to milliseconds
REGULAR_S = Fraction(3, 2000)


@dataclass(frozen=True)
class Track:
    """One kept track of the source."""

    index: int
    kind: str
    #: FFmpeg's encoder, or copy
    codec: str


@dataclass(frozen=True)
class TrackPlan:
    """What becomes of the source's tracks."""

    kept: tuple[Track, ...] = ()
    #: one line for each track that the output lacks
    dropped: tuple[str, ...] = ()
    #: the source's time code is among `dropped`
    without_timecode: bool = False


def plan_tracks(source: Path, suffix: str, frame_rate: Fraction | None = None) -> TrackPlan:
    """Sound, subtitles and attachments of `source` in a container of this suffix.

    Args:
        frame_rate: of the output; None: the source's.

    Raises:
        UserError: the file is not readable.
    """
    kept: list[Track] = []
    dropped: list[str] = []
    try:
        with av.open(url(source)) as container:
            chosen = first_video(container)
            if _timecode(container, chosen):
                if suffix not in TIMECODE_SUFFIXES:
                    dropped.append(f"its time code is left out: {suffix} does not take it")
                elif frame_rate not in (None, chosen.average_rate):
                    dropped.append("its time code is left out: it counts frames of the source's rate")
            without_timecode = bool(dropped)
            for stream in container.streams:
                if stream.type == "video" and stream.index == chosen.index:
                    continue
                if stream.type == "data" and container.chapters():
                    continue  # they are kept as chapters
                if stream.type == "data" and "timecode" in stream.metadata:
                    continue  # it is kept as the video's tag
                name = stream.codec_context.name if stream.codec_context else None
                codec = _kept_as(stream, name, suffix)
                if codec is not None:
                    kept.append(Track(stream.index, stream.type, codec))
                    continue
                known = name or "a codec that FFmpeg does not know"
                reason = "nothing here decodes it" if stream.type == "audio" else f"{suffix} does not take it"
                reason = "one video stream is upscaled" if stream.type == "video" else reason
                dropped.append(f"track {stream.index} ({stream.type}, {known}) is left out: {reason}")
    except FFmpegError as error:
        raise UserError(f"{source} is not a readable video ({error})") from None
    return TrackPlan(tuple(kept), tuple(dropped), without_timecode)


def _timecode(container: Any, video: Any) -> str | None:
    """Of the first frame, hours:minutes:seconds:frames, before the frames `;` where numbers are dropped."""
    tags = {name.lower(): value for name, value in (container.metadata | video.metadata).items()}
    return tags.get("timecode")


def _kept_as(stream: Any, codec: str | None, suffix: str) -> str | None:
    """FFmpeg's encoder, copy, or None for a track that the container lacks."""
    if stream.type == "audio" and codec is not None:
        slow = codec.startswith("mp3") and suffix in (".mp4", ".m4v") and stream.codec_context.rate < MP3_IN_MP4_HZ
        return "copy" if codec in COPIED_AUDIO[suffix] and not slow else NEW_AUDIO.get(suffix, "aac")
    if stream.type == "subtitle" and suffix == ".mkv":
        return "copy" if codec in MATROSKA_SUBTITLES else "srt" if codec in TEXT_SUBTITLES else None
    if stream.type == "subtitle" and codec in TEXT_SUBTITLES:
        return NEW_SUBTITLES.get(suffix)
    return "copy" if stream.type == "attachment" and suffix == ".mkv" else None


def times_restart(source: Path) -> bool:
    """Whether the time stamps of the video stream go back within the file, as in recordings put one after the other."""
    with av.open(url(source)) as container:
        previous = None
        for packet in container.demux(first_video(container)):
            if packet.dts is not None:
                time = packet.dts * packet.time_base
                if previous is not None and time < previous - RESTART_S:
                    return True
                previous = time
    return False


def frame_times(stamps: Sequence[Fraction | None], rate: Fraction) -> list[Fraction]:
    """Seconds of each frame, rising: the time stamps, or a constant `rate` where they are that rate, rounded.

    A frame without a time stamp, or with one that does not follow the last, comes one period after it.
    """
    times: list[Fraction] = []
    for stamp in stamps:
        following = times[-1] + 1 / rate if times else Fraction(0)
        time = following if stamp is None else stamp
        times.append(time if not times or time > times[-1] else following)
    if times and all(abs(time - times[0] - number / rate) <= REGULAR_S for number, time in enumerate(times)):
        return [times[0] + number / rate for number in range(len(times))]
    return times


def join(
    parts: Sequence[Path], path: Path, times: Sequence[Fraction] | None = None, last_s: Fraction | None = None
) -> None:
    """Put the frames of `parts`, encoded alike, one after the other into `path`, without encoding them again.

    Args:
        times: seconds of each frame, rising; the file starts with the first one at zero. None: as in the parts.
        last_s: how long the last frame is shown; None: as long as the one before.

    Raises:
        UserError: `path` cannot be written.
    """
    try:
        with atomic_file(path) as temporary, av.open(url(temporary), "w") as output:
            _copy(parts, output, times, last_s)
    except (FFmpegError, OSError) as error:
        raise UserError(f"cannot write {path}: {ffmpeg_reason(str(error).encode())}") from None


def _copy(parts: Sequence[Path], output: Any, times: Sequence[Fraction] | None, last_s: Fraction | None) -> None:
    counts, delay, rate = _measure(parts)
    number = sum(counts)
    base = _time_base(times, rate)
    seconds = [time - times[0] for time in times] if times else [place / rate for place in range(number)]
    stamps = [round(time / base) for time in seconds]
    if len(stamps) != number:
        raise UserError(f"{number} frames were written, {len(stamps)} times are known; run with --restart")
    period = stamps[-1] - stamps[-2] if number > 1 else round(1 / rate / base)
    last = round(last_s / base) if last_s else period
    durations = [b - a for a, b in pairwise([*stamps, stamps[-1] + last])]
    stream: Any = None
    place = before = 0
    for part, count in zip(parts, counts, strict=True):
        with av.open(url(part)) as container:
            source = container.streams.video[0]
            if stream is None:
                stream = output.add_stream_from_template(source, opaque=True)
                stream.time_base = base
            for packet, shown in _numbered(container):
                number = before + shown
                copy = av.Packet(bytes(packet))
                copy.stream, copy.time_base, copy.is_keyframe = stream, base, packet.is_keyframe
                copy.pts, copy.duration = stamps[number], durations[number]
                if place == len(stamps) - 1 and last != period:  # in MP4, what is decoded last lasts until the end
                    copy.duration = stamps[-1] + last - stamps[number]
                copy.dts = stamps[place - delay] if place >= delay else stamps[0] - (delay - place) * period
                output.mux(copy)
                place += 1
        before += count


def _measure(parts: Sequence[Path]) -> tuple[list[int], int, Fraction]:
    """Frames of each part; how many places a frame is shown after it is decoded, at most; frames per second."""
    counts, delay = [], 0
    for part in parts:
        with av.open(url(part)) as container:
            rate = Fraction(container.streams.video[0].average_rate)
            shown = [number for _, number in _numbered(container)]
        counts.append(len(shown))
        delay = max(delay, *(place - number for place, number in enumerate(shown)))
    return counts, delay, rate


def _numbered(container: Any) -> Iterator[tuple[Any, int]]:
    """Packets in the order of decoding, each with the number of its frame in the order of showing."""
    stream = container.streams.video[0]
    rate = Fraction(stream.average_rate)
    start = stream.start_time or 0
    for packet in container.demux(stream):
        if packet.pts is not None:
            yield packet, round((packet.pts - start) * stream.time_base * rate)


def _time_base(times: Sequence[Fraction] | None, rate: Fraction) -> Fraction:
    """A unit that every time is a multiple of, if there is one of at least a microsecond."""
    if times is None or all(b - a == 1 / rate for a, b in pairwise(times)):
        return 1 / rate
    denominator = math.lcm(*(time.denominator for time in times))
    return Fraction(1, denominator if denominator <= 1_000_000 else 90_000)


def write_output(
    video: Path,
    output: Path,
    source: Path | None,
    tracks: TrackPlan,
    offset: Fraction,
    frame_rate: Fraction,
    *,
    restarts: bool = False,
    limit_s: float | None = None,
) -> None:
    """The joined `video` and the kept tracks of `source` in a file of the output's kind, with chapters and titles.

    Args:
        offset: seconds from the start of the source's first stream to the first frame.
        frame_rate: of a container without time stamps.
        restarts: the source's time stamps start anew within it; FFmpeg then mends those of the sound as well.
        limit_s: write so many seconds, to see whether it can be written.

    Raises:
        UserError: the file cannot be written.
    """
    suffix = output.suffix.lower()
    start_s, index = 0.0, 0
    if source is not None:
        with av.open(url(source)) as container:
            start_s = (container.start_time or 0) / av.time_base
            index = first_video(container).index
    # AVI has no times: what stands before the first sound or frame is written as silence or empty frames.
    absolute = not restarts and suffix != ".avi"
    command = [ffmpeg_binary(), "-loglevel", "error", "-nostdin", "-y", *(["-copyts"] if absolute else [])]
    if suffix == ".avi":
        command += ["-r", str(frame_rate)]
    shift = float(offset) + (start_s if absolute else 0.0)
    command += ["-itsoffset", f"{shift:.6f}", "-i", url(video)]
    maps = ["-map", "0:v:0"]
    if source is not None:
        # Shifted together at the end: FFmpeg 5 forgets an -itsoffset of MPEG-TS whose first stream is not mapped.
        command += ["-i", url(source)]
        maps += ["-map_metadata", "1", "-map_chapters", "1", "-map_metadata:s:v:0", f"1:s:{index}"]
        maps += ["-metadata", "timecode=", "-metadata:s:v:0", "timecode="] if tracks.without_timecode else []
        maps += ["-output_ts_offset", f"{-start_s:.6f}"] if absolute else []
        counts: dict[str, int] = {}
        for track in tracks.kept:
            letter = {"audio": "a", "subtitle": "s", "attachment": "t"}[track.kind]
            place = counts[letter] = counts.get(letter, -1) + 1
            maps += ["-map", f"1:{track.index}", f"-c:{letter}:{place}", track.codec]
            maps += [f"-map_metadata:s:{letter}:{place}", f"1:s:{track.index}"]
            if letter == "a" and track.codec != "copy":
                maps += [f"-b:{letter}:{place}", "256k", f"-filter:{letter}:{place}", LAYOUTS[track.codec]]
    maps += ["-c:v", "copy", "-max_interleave_delta", "0", "-fflags", "+bitexact"]  # a resumed file has the same bytes
    if suffix in (".mp4", ".mov", ".m4v"):
        maps += ["-movflags", "+faststart" + ("+use_metadata_tags" if suffix == ".mov" else "")]
    if limit_s is not None:
        maps += ["-t", f"{limit_s:.3f}"]
    with atomic_file(output) as temporary:
        done = subprocess.run([*command, *maps, url(temporary)], stderr=subprocess.PIPE, check=False)
        if done.returncode:
            raise UserError(f"cannot write {output}: {ffmpeg_reason(done.stderr)}")

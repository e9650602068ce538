"""Decoding in a child process: a hostile file can crash or block FFmpeg there without harm to the job.

A file that crashes the decoder, or keeps it busy for ever, ends the child and is quarantined; inside a Ray worker it
would kill the worker, be retried, and kill the next. One child serves a worker for all its files. Requests are JSON
lines, frames come back as raw bytes.

Not pebble: it sends results through pickle, which a child that decodes hostile files must not, and takes 0.33 s for a
window of 21 x 720 x 1280 that the raw pipe passes in 0.16 s (measured with pebble 5, means of 8).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np

from common.errors import StorageError, UserError
from common.lossless_clip import UnreadableVideo
from common.storage import StorageConfig
from datagen.config import ClipConfig, DatagenConfig
from datagen.sources import Source, open_source
from datagen.survey.source_survey import SourceSurvey, from_document, to_document
from datagen.survey.video_survey import survey
from datagen.survey.window_reader import WindowReader

PR_SET_PDEATHSIG = 1
#: pauses between attempts to reach a file, s: the first, doubled each time, and the longest [ours]
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 30.0

Answer = TypeVar("Answer")


def survey_isolated(source: Source, config: DatagenConfig, storage: StorageConfig) -> SourceSurvey:
    """`survey`, in the child.

    Raises:
        UnreadableVideo: no video, it breaks off, crashes the decoder or takes too long.
        StorageError: the file's bytes cannot be read.
    """
    request = {"do": "survey", "clip": config.clip.model_dump(mode="json")}
    # a survey decodes everything, a window a little: the limit is per window, a video has many
    header, _ = _ask(request, source, config, storage, patience=20)
    survey = from_document(header["survey"], source)
    assert isinstance(survey, SourceSurvey)
    return survey


def decode_isolated(
    source: Source, start: int, pts: int | None, frames: int, config: DatagenConfig, storage: StorageConfig
) -> np.ndarray:
    """A window by `WindowReader`, in the child; raises like `survey_isolated`, StorageError after all attempts."""
    request = {"do": "window", "start": start, "pts": pts, "frames": frames}
    header, content = _patiently(lambda: _ask(request, source, config, storage, patience=1), storage.attempts)
    return np.frombuffer(content, np.uint8).reshape(header["shape"])


def _patiently(ask: Callable[[], Answer], attempts: int) -> Answer:
    """`ask()`, again while files are out of reach."""
    for attempt in range(attempts - 1):
        try:
            return ask()
        except StorageError:
            time.sleep(min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S))
    return ask()


_child: subprocess.Popen[bytes] | None = None


def _ask(
    request: dict[str, Any], source: Source, config: DatagenConfig, storage: StorageConfig, patience: int
) -> tuple[dict[str, Any], bytearray]:
    """Send one request and wait for header and content."""
    child = _running_child()
    assert child.stdin is not None and child.stdout is not None
    limit_s = config.decode_timeout_s * patience
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        child.kill()

    timer = threading.Timer(limit_s, expire)
    timer.start()
    try:
        request = request | {"path": source.path, "name": source.id, "storage": storage.model_dump(mode="json")}
        child.stdin.write(json.dumps(request).encode() + b"\n")
        child.stdin.flush()
        header = json.loads(child.stdout.readline())
        content = bytearray(header.get("bytes", 0))
        view = memoryview(content)
        while len(view):
            count = child.stdout.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise EOFError
            view = view[count:]
    except (EOFError, BrokenPipeError, json.JSONDecodeError):
        _end_child()
        if expired.is_set():
            raise UnreadableVideo(f"{source.id}: not decoded within {limit_s:g} s") from None
        raise UnreadableVideo(f"{source.id}: crashes the decoder") from None
    finally:
        timer.cancel()
    if "unreachable" in header:
        raise StorageError(header["unreachable"])
    if "unreadable" in header:
        raise UnreadableVideo(header["unreadable"])
    if "error" in header:
        raise UserError(header["error"])
    return header, content


def _running_child() -> subprocess.Popen[bytes]:
    global _child
    if _child is None or _child.poll() is not None:
        _child = subprocess.Popen(
            [sys.executable, "-m", "datagen.survey.decoder_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
        )
        atexit.register(_end_child)
    return _child


def _end_child() -> None:
    global _child
    if _child is not None:
        _child.kill()
        _child.wait()
        for pipe in (_child.stdin, _child.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]
        _child = None


def _serve() -> None:
    """The child: answer requests until the worker closes the pipe or dies."""
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # nothing but answers may reach the pipe
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    reader = WindowReader()
    for line in sys.stdin.buffer:
        header, content = _answer(json.loads(line), reader)
        answers.write(json.dumps(header | {"bytes": len(content)}).encode() + b"\n")
        answers.write(content)
        answers.flush()


def _answer(request: dict[str, Any], reader: WindowReader) -> tuple[dict[str, Any], memoryview]:
    nothing = memoryview(b"")
    path, name = request["path"], request["name"]
    source = partial(open_source, path, StorageConfig(**request["storage"]))
    try:
        if request["do"] == "survey":
            found = survey(Source(name, path), source(), ClipConfig(**request["clip"]))
            return {"survey": to_document(found)}, nothing
        window = reader.read(path, source, name, request["start"], request["pts"], request["frames"])
        return {"shape": window.shape}, window.data.cast("B")
    except Exception as error:
        fault = _storage_fault(source)
        if fault:
            return {"unreachable": f"{name}: {path} cannot be read: {fault}; is its disk or server there?"}, nothing
        if isinstance(error, UserError):
            return {"unreadable" if isinstance(error, UnreadableVideo) else "error": str(error)}, nothing
        return {"unreadable": f"{name}: {type(error).__name__}: {error}"}, nothing


def _storage_fault(source: Callable[[], Any]) -> str | None:
    """Why a file's bytes cannot be read, whatever they mean; None where they can.

    FFmpeg's own errors do not tell: it says "input/output error" of files that break off, too.
    """
    try:
        found = source()
        with open(found, "rb") if isinstance(found, str) else found as file:
            while file.read(1 << 20):
                pass
    except OSError as error:
        return error.strerror or str(error)
    except UserError as error:
        return str(error)
    return None


if __name__ == "__main__":
    _serve()

"""A page to upscale videos on this machine: drop one, watch the progress, compare at 1:1, download.

    duo-vsr web [--port 7860] [options of upscale, as --model MODEL_DIR]

It runs what `python -m pipeline.upscale` runs. It listens on the loopback interface: whoever reaches the page can use
the machine, so `--host` is for networks that are trusted.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.command_line import exit_on_sigterm
from common.errors import UserError, for_people, run_command
from common.video_probe import VIDEO_SUFFIXES, probe
from common.video_reader import read_video
from pipeline.upscale import upscale_file
from pipeline.upscale_options import DEFAULT_MODEL, parse_arguments

#: the page is told of progress so often, seconds
INTERVAL_S = 0.5
#: of the box with the file to download
RESULT_PX = 110
#: of the source's name in that of the result, characters
LONGEST_STEM = 40
#: of the frames that are compared; PNG would take long to send
JPEG_QUALITY = 95
CSS = """
.compare {position: relative; overflow: auto; width: fit-content; max-width: 100%; max-height: 80vh}
.compare .frames {position: relative}
.compare img {max-width: none; display: block; margin: 0}
.compare .after {position: absolute; top: 0; left: 0}
.compare input {position: sticky; left: 0; bottom: 0; display: block; z-index: 1}
"""


class _CancelledError(Exception):
    """The visitor wants no more of it."""


class Page:
    """What the page's buttons do; each visitor has a job at a time."""

    def __init__(self, options: list[str]) -> None:
        """
        Args:
            options: of the upscale command.

        Raises:
            UserError: one of them is wrong.
        """
        self._options = options
        self._folder = tempfile.TemporaryDirectory(prefix="duo-vsr-")  # results are gone when the page is
        self._cancelled: dict[str, threading.Event] = {}
        self._threads: dict[str, threading.Thread] = {}
        model = parse_arguments(["in.mp4", "out.mp4", *options, "--scale", "4"]).model
        #: what upscales, in words
        self.model = "a bicubic filter, without a model" if model is None else f"the model in {model}"
        if model == DEFAULT_MODEL:
            self.model = "the small model that comes with the repository, trained on a CPU"

    @property
    def folder(self) -> str:
        """Where results are."""
        return self._folder.name

    def upscale(self, path: str | None, scale: float, visitor: str = "") -> Iterator[tuple[str, str | None]]:
        """What is said of the video and how far it is; with the last of them the file to download.

        Closing the iterator cancels the job, as `cancel` does.

        Raises:
            UserError: what the command would say.
        """
        if path is None:
            raise UserError("drop a video first")
        source = Path(path)
        output = Path(tempfile.mkdtemp(dir=self.folder)) / f"{source.stem[:LONGEST_STEM]}-x{scale:g}.mp4"
        arguments = parse_arguments([str(source), str(output), *self._options, "--scale", str(scale)])
        cancelled = self._cancelled[visitor] = threading.Event()
        said: list[str] = []
        began = time.monotonic()
        written: list[tuple[int, int | None, float]] = []

        def watch(done: int, total: int | None) -> None:
            written.append((done, total, time.monotonic()))
            if cancelled.is_set():
                raise _CancelledError

        def shown(line: str) -> str:
            return "\n".join([line, *said])

        def work() -> None:
            try:
                job.set_result(upscale_file(source, output, arguments, watch, said.append))
            except BaseException as error:
                shutil.rmtree(output.parent, ignore_errors=True)
                job.set_exception(error)

        job: Future[bool] = Future()
        thread = self._threads[visitor] = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield "opening the model", None
            while not wait([job], INTERVAL_S).done:
                line = "cancelling: the window that is worked on has to end first"
                if not cancelled.is_set():
                    line = progress_line(written, began)
                yield shown(line), None
            job.result()
        except _CancelledError:
            yield "cancelled", None
            return
        finally:
            cancelled.set()
        line = f"done: {probe(output).frames} frames in {duration(time.monotonic() - began)}"
        yield shown(line), str(output)

    def cancel(self, visitor: str = "") -> None:
        """End this visitor's job, if there is one, after the window that is worked on."""
        if visitor in self._cancelled:
            self._cancelled[visitor].set()

    def close(self) -> None:
        """End all jobs, each after the window that is worked on."""
        for cancelled in self._cancelled.values():
            cancelled.set()
        for thread in self._threads.values():
            thread.join()

    def compare(self, source: str | None, output: str | None, place: float) -> str:
        """HTML of one frame before (bicubic) and after, one pixel of the output for one of the screen.

        Args:
            place: of the frame in the video, 0…1.
        """
        if source is None or output is None:
            return ""
        frames = probe(output).frames or 1
        number = min(round(place * (frames - 1)), frames - 1)
        after = read_video(output, number, 1)[0]
        before = Image.fromarray(read_video(source, number, 1)[0])
        enlarged = before.resize((after.shape[1], after.shape[0]), Image.Resampling.BICUBIC)
        return comparison(np.asarray(enlarged), after)


def progress_line(written: Sequence[tuple[int, int | None, float]], began: float) -> str:
    """As `120 of 1500 frames (8%), 3 frames/s, about 7 min 40 s left`.

    Args:
        written: frames so far, in all (None: not known) and the time, for each window that was written. The rate is
            that after the first one, which waits for the model.
        began: when the job did.
    """
    if not written:
        return f"the first window, for {duration(time.monotonic() - began)}"
    first, (done, total, now) = (written[0] if len(written) > 1 else (0, None, began)), written[-1]
    rate = (done - first[0]) / max(now - first[2], 1e-9)
    if total is None:
        return f"{done} frames, {rate:.3g} frames/s"
    left = max((total - done) / rate - (time.monotonic() - now), 0)
    return f"{done} of {total} frames ({done / total:.0%}), {rate:.3g} frames/s, about {duration(left)} left"


def duration(seconds: float) -> str:
    """As `8 s`, `7 min 40 s` or `2 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def comparison(before: np.ndarray, after: np.ndarray) -> str:
    """HTML of two frames (H, W, 3) of one size with a slider between them."""
    height, width = after.shape[:2]
    move = "this.parentNode.querySelector('.after').style.clipPath='inset(0 0 0 '+this.value+'%)'"
    return (
        f'<div class="compare"><div class="frames" style="width:{width}px;height:{height}px">'
        f'<img class="before" alt="before" width="{width}" height="{height}" src="{_data_url(before)}">'
        f'<img class="after" alt="after" width="{width}" height="{height}" src="{_data_url(after)}" '
        'style="clip-path:inset(0 0 0 50%)"></div>'
        f'<input type="range" min="0" max="100" value="50" aria-label="before and after" oninput="{move}" '
        f'style="width:{width}px;max-width:100%"></div><p>Left of the slider: bicubic. Right: the model.</p>'
    )


def _data_url(frame: np.ndarray) -> str:
    content = io.BytesIO()
    Image.fromarray(frame).save(content, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


def build(page: Page) -> Any:
    """The gradio page; `launch` starts it.

    Raises:
        UserError: gradio is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing leaves the machine
    try:
        import gradio
    except ImportError as error:
        raise UserError(f"the page needs gradio ({error}): pip install 'duo-vsr[web]'") from None
    os.environ["GRADIO_TEMP_DIR"] = page.folder  # uploads are gone when the page is, too

    def upscale(path: str | None, scale: float, request: Any) -> Iterator[tuple[str, str | None]]:
        try:
            yield from page.upscale(path, scale, str(request.session_hash))
        except Exception as error:
            message = for_people(error)
            if message is None:
                raise
            for_visitor = message if path is None else message.replace(path, Path(path).name)
            yield f"error: {for_visitor}", None

    def cancel(request: Any) -> None:
        page.cancel(str(request.session_hash))

    for function in (upscale, cancel):  # gradio reads it there; as a name it would be looked up among the module's
        function.__annotations__["request"] = gradio.Request

    def compare(source: str | None, output: str | None, percent: float) -> tuple[Any, str]:
        compared = page.compare(source, output, percent / 100)
        return gradio.update(visible=bool(compared)), compared

    with gradio.Blocks(title="DUO-VSR") as blocks:
        gradio.Markdown(f"# DUO-VSR\nOne-step video super-resolution, by {page.model}.")
        with gradio.Row():
            source = gradio.File(label="Video", file_types=list(VIDEO_SUFFIXES), type="filepath")
            with gradio.Column():
                scale = gradio.Dropdown([("×1.5", 1.5), ("×2", 2.0), ("×4", 4.0)], value=4.0, label="Scale")
                with gradio.Row():
                    start = gradio.Button("Upscale", variant="primary")
                    stop = gradio.Button("Cancel")
                status = gradio.Textbox(label="Progress", interactive=False, lines=3)
                result = gradio.File(label="Result", interactive=False, height=RESULT_PX)
        with gradio.Column(visible=False) as comparing:
            place = gradio.Slider(0, 100, 50, step=1, label="Frame to compare, at so many percent of the video")
            compared = gradio.HTML(label="Before and after")
        done = start.click(upscale, [source, scale], [status, result])
        stop.click(cancel, queue=False)
        blocks.unload(cancel)  # nobody waits for it
        for event in (done.success, place.release):
            event(compare, [source, result, place], [comparing, compared])
    return blocks


def main() -> None:
    exit_on_sigterm()  # what is in the page's folder is removed
    parser = argparse.ArgumentParser(prog="duo-vsr web", description=__doc__, add_help=True)
    parser.add_argument("--host", default="127.0.0.1", help="interface to listen on; default: this machine alone")
    parser.add_argument("--port", type=int, default=7860)
    arguments, options = parser.parse_known_args()
    page = Page(options)
    blocks = build(page)
    import gradio

    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no fonts from elsewhere
    try:
        blocks.launch(server_name=arguments.host, server_port=arguments.port, css=CSS, theme=theme, footer_links=[])
    except OSError as error:
        raise UserError(f"--host {arguments.host} --port {arguments.port}: {error}; choose another port") from None
    finally:
        page.close()


if __name__ == "__main__":
    run_command(main)

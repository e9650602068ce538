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
import queue
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.errors import UserError, run_command
from common.video_probe import probe
from common.video_reader import read_video
from pipeline.upscale import upscale_file
from pipeline.upscale_options import parse_arguments

#: the page is told of progress at most so often, seconds
INTERVAL_S = 0.5
#: of the frames that are compared; PNG would take long to send
JPEG_QUALITY = 95
CSS = """
.compare {position: relative; overflow: auto; max-height: 80vh; border: 1px solid #8888}
.compare .frames {position: relative}
.compare img {max-width: none; display: block; margin: 0}
.compare .after {position: absolute; top: 0; left: 0}
.compare input {position: sticky; left: 0; bottom: 0; display: block; z-index: 1}
"""


class Page:
    """What the page's buttons do."""

    def __init__(self, options: list[str]) -> None:
        """
        Args:
            options: of the upscale command.

        Raises:
            UserError: one of them is wrong.
        """
        self._options = options
        self._folder = tempfile.TemporaryDirectory(prefix="duo-vsr-")  # results are gone when the page is
        parse_arguments(["in.mp4", "out.mp4", *options])

    def upscale(self, path: str | None, scale: float) -> Iterator[tuple[str, str | None]]:
        """Lines of progress; with the last one the file to download.

        Raises:
            UserError: what the command would say.
        """
        if path is None:
            raise UserError("drop a video first")
        source = Path(path)
        output = Path(tempfile.mkdtemp(dir=self._folder.name)) / f"{source.stem}-x{scale:g}.mp4"
        arguments = parse_arguments([str(source), str(output), *self._options, "--scale", str(scale)])
        news: queue.Queue[tuple[int, int | None] | BaseException | None] = queue.Queue()

        def work() -> None:
            try:
                damaged = upscale_file(source, output, arguments, lambda done, total: news.put((done, total)))
                news.put(UserError("the input is damaged; what can be read is upscaled") if damaged else None)
            except BaseException as error:
                news.put(error)

        threading.Thread(target=work, daemon=True).start()
        began = last = time.monotonic()
        yield "opening the model", None
        while isinstance(new := news.get(), tuple):
            if time.monotonic() - last >= INTERVAL_S:
                last = time.monotonic()
                yield progress_line(*new, last - began), None
        if new is not None and not output.exists():
            raise new
        frames = probe(output).frames
        seconds = time.monotonic() - began
        warning = "" if new is None else f"; {new}"
        yield f"done: {frames} frames in {seconds:.0f} s{warning}", str(output)

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


def progress_line(done: int, total: int | None, seconds: float) -> str:
    """As `120/1500 frames, 3.2 frames/s, 431 s left`."""
    rate = done / max(seconds, 1e-9)
    if total is None:
        return f"{done} frames, {rate:.3g} frames/s"
    return f"{done}/{total} frames, {rate:.3g} frames/s, {(total - done) / rate:.0f} s left"


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
        f'style="width:min(100%,{width}px)"></div><p>Left of the slider: bicubic. Right: the model.</p>'
    )


def _data_url(frame: np.ndarray) -> str:
    content = io.BytesIO()
    Image.fromarray(frame).save(content, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


def build(options: list[str]) -> Any:
    """The gradio page; `launch` starts it.

    Raises:
        UserError: gradio is not installed, or an option of upscale is wrong.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing leaves the machine
    try:
        import gradio
    except ImportError as error:
        raise UserError(f"the page needs gradio ({error}): pip install 'duo-vsr[web]'") from None
    page = Page(options)

    def upscale(path: str | None, scale: float) -> Iterator[tuple[str, str | None]]:
        try:
            yield from page.upscale(path, scale)
        except UserError as error:
            raise gradio.Error(str(error)) from None

    with gradio.Blocks(title="DUO-VSR") as blocks:
        gradio.Markdown("# DUO-VSR\nOne-step video super-resolution.")
        with gradio.Row():
            source = gradio.File(label="Video", file_types=["video"], type="filepath")
            with gradio.Column():
                scale = gradio.Dropdown([1.5, 2.0, 4.0], value=4.0, label="Scale")
                start = gradio.Button("Upscale", variant="primary")
                status = gradio.Textbox(label="Progress", interactive=False)
                result = gradio.File(label="Result", interactive=False)
        place = gradio.Slider(0, 1, 0.5, label="Frame to compare: from the first to the last")
        compared = gradio.HTML(label="Before and after")
        done = start.click(upscale, [source, scale], [status, result])
        shown = (page.compare, [source, result, place], compared)
        done.success(*shown)
        place.release(*shown)
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(prog="duo-vsr web", description=__doc__, add_help=True)
    parser.add_argument("--host", default="127.0.0.1", help="interface to listen on; default: this machine alone")
    parser.add_argument("--port", type=int, default=7860)
    arguments, options = parser.parse_known_args()
    blocks = build(options)
    import gradio

    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # no fonts from elsewhere
    blocks.launch(server_name=arguments.host, server_port=arguments.port, css=CSS, theme=theme)


if __name__ == "__main__":
    run_command(main)

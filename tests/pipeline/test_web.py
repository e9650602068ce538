"""The page, driven by a real browser; and what it does without one."""

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from common.video_probe import ffmpeg_binary, probe
from common.video_reader import read_video
from pipeline.web import CSS, Page, build, duration, progress_line
from tests.browser import CHROMIUM, BrowserPage, browser_page


@pytest.fixture
def video(tmp_path):
    """1.2 s of 96x64 with a tone."""
    path = tmp_path / "clip.mp4"
    sources = ("-f", "lavfi", "-i", "testsrc2=s=96x64:r=25:d=1.2", "-f", "lavfi", "-i", "sine=d=1.2")
    subprocess.run([ffmpeg_binary(), "-v", "error", *sources, str(path)], check=True)
    return path


def test_a_missing_gradio_is_one_line_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"needs gradio .*: pip install 'duo-vsr\[web\]'"):
        build(Page(["--bicubic"]))


def test_it_does_what_the_command_does(video, upscale, tmp_path):
    page = Page(["--bicubic"])
    lines = list(page.upscale(str(video), 2.0))
    assert lines[-1][0].startswith("done: 30 frames in ") and all(path is None for _, path in lines[:-1])
    output = lines[-1][1]
    assert output is not None and output.endswith("clip-x2.mp4")
    assert upscale(video, tmp_path / "out.mp4", "--bicubic", "--scale", 2).returncode == 0
    assert np.array_equal(read_video(output), read_video(tmp_path / "out.mp4"))
    assert probe(output).audio_codecs == ("aac",)
    compared = page.compare(str(video), output, 1.0)
    assert compared.count("data:image/jpeg;base64,") == 2 and "width:192px;height:128px" in compared


def test_errors_are_those_of_the_command(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UserError, match="is not a readable video"):
        list(Page(["--bicubic"]).upscale(str(tmp_path / "text.mp4"), 2.0))
    with pytest.raises(UserError, match="drop a video first"):
        list(Page(["--bicubic"]).upscale(None, 2.0))
    with pytest.raises(UserError, match="--steps 0: it must be"):
        Page(["--bicubic", "--steps", "0"])


def test_a_cancelled_job_leaves_nothing(video):
    page = Page(["--bicubic", "--part-frames", "1"])
    lines = page.upscale(str(video), 2.0, "anna")
    assert next(lines) == ("opening the model", None)
    page.cancel("bert")
    page.cancel("anna")
    assert list(lines)[-1] == ("cancelled", None)
    left = page.upscale(str(video), 2.0, "anna")
    next(left)
    left.close()  # as a closed tab does
    page.close()
    assert list(Path(page.folder).iterdir()) == []


def test_what_the_command_says_is_shown(tmp_path):
    source = tmp_path / "deep.mkv"
    pattern = ("-f", "lavfi", "-i", "testsrc2=s=32x24:r=25:d=0.2", "-c:v", "ffv1", "-pix_fmt", "yuv420p10le")
    subprocess.run([ffmpeg_binary(), "-v", "error", *pattern, str(source)], check=True)
    last, _ = list(Page(["--bicubic"]).upscale(str(source), 2.0))[-1]
    assert last.splitlines()[1] == "deep.mkv: 10 bits become 8; --bit-depth 10 keeps 10"


def test_options_that_the_page_sets_itself_are_refused():
    with pytest.raises(UserError, match="--scale: not allowed with argument --height"):
        Page(["--bicubic", "--height", "720"])


def test_progress_has_rate_and_time_left():
    """The first window waits for the model: its rate is not that of the rest."""
    now = time.monotonic()
    assert progress_line([], now - 90) == "the first window, for 1 min 30 s"
    assert progress_line([(16, 160, now)], now - 8) == "16 of 160 frames (10%), 2 frames/s, about 1 min 12 s left"
    rest = [(20, 1500, now - 40), (120, 1500, now)]
    assert progress_line(rest, now - 100) == "120 of 1500 frames (8%), 2.5 frames/s, about 9 min 12 s left"
    assert progress_line([(20, None, now - 40), (120, None, now)], now) == "120 frames, 2.5 frames/s"
    assert [duration(seconds) for seconds in (8.4, 60, 7500)] == ["8 s", "1 min 0 s", "2 h 5 min"]


PROGRESS = "document.querySelector('textarea').value"


async def press(page: BrowserPage, name: str) -> None:
    """A button, when it is there."""
    button = f"[...document.querySelectorAll('button')].find(button => button.textContent.trim() === '{name}')"
    await page.wait(button)
    await page.evaluate(f"{button}.click()")


async def upscale_in_browser(address: str, video: Path, folder: Path) -> None:
    """Wrong file, cancelled, then the whole of it; screenshots and the download are in `folder`."""
    (folder / "text.mp4").write_text("no video")
    (folder / "down").mkdir()
    async with browser_page(folder / "profile") as page:
        await page.download_to(folder / "down")
        await page.open(address)
        await page.wait("document.querySelector('input[type=file]')")
        await press(page, "Upscale")
        await page.wait(f"{PROGRESS} === 'error: drop a video first'")
        await page.choose_file(folder / "text.mp4")
        await page.wait("document.body.textContent.includes('text.mp4')")
        await press(page, "Upscale")
        await page.wait(f"{PROGRESS}.startsWith('error: text.mp4 is not a readable video')")
        await page.open(address)
        await page.wait("document.querySelector('input[type=file]')")
        await page.choose_file(video)
        await page.wait("document.body.textContent.includes('clip.mp4')")
        await press(page, "Upscale")
        await page.wait(f"{PROGRESS}")
        await press(page, "Cancel")
        await page.wait(f"{PROGRESS} === 'cancelled'")
        await press(page, "Upscale")
        await page.wait(f"{PROGRESS}.startsWith('done: 30 frames in ')")
        await page.wait("document.querySelector('.compare img.after')")
        box = await page.evaluate("document.querySelector('.compare img.after').getBoundingClientRect().toJSON()")
        assert (box["width"], box["height"]) == (384, 256), "one pixel is one pixel"
        await page.screenshot(folder / "page.png")
        for place in (0, 100):
            slider = f"slider = document.querySelector('.compare input'), slider.value = {place}"
            await page.evaluate(f"{slider}, slider.dispatchEvent(new Event('input'))")
            await page.screenshot(folder / f"{place}.png", ".frames")
        await page.evaluate("[...document.querySelectorAll('a[download]')].at(-1).click()")
        for _ in range(200):
            if any(path.suffix == ".mp4" for path in (folder / "down").iterdir()):
                break
            await asyncio.sleep(0.05)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_a_browser_upscales_compares_and_downloads(video, model_folder, tmp_path):
    pytest.importorskip("gradio", reason="needs gradio: pip install 'duo-vsr[web]'", exc_type=ImportError)
    page = Page(["--model", str(model_folder), "--window", "9", "--overlap", "2"])
    blocks = build(page)
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, css=CSS)
    try:
        assert "127.0.0.1" in address
        asyncio.run(upscale_in_browser(address, video, tmp_path))
    finally:
        blocks.close()
        page.close()
    (result,) = (tmp_path / "down").iterdir()
    info = probe(result)
    assert result.name == "clip-x4.mp4"
    assert (info.width, info.height, info.frames, info.audio_codecs) == (384, 256, 30, ("aac",))
    middle = read_video(result, 14, 1)[0].astype(float)
    shots = [np.asarray(Image.open(tmp_path / f"{place}.png").convert("RGB")) for place in (0, 100)]
    shown_after, shown_before = (np.abs(shot[:256, :384] - middle).mean() for shot in shots)
    assert shown_after < 0.25 * shown_before, (shown_after, shown_before)

"""The page, driven by a real browser; and what it does without one."""

import io
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from common.video_probe import ffmpeg_binary, probe
from common.video_reader import read_video
from pipeline.web import CSS, Page, build, progress_line

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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
        build(["--bicubic"])


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


def test_progress_has_rate_and_time_left():
    assert progress_line(120, 1500, 40.0) == "120/1500 frames, 3 frames/s, 460 s left"
    assert progress_line(120, None, 40.0) == "120 frames, 3 frames/s"


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_a_browser_upscales_compares_and_downloads(video, model_folder, tmp_path):
    pytest.importorskip("gradio", reason="needs gradio: pip install 'duo-vsr[web]'", exc_type=ImportError)
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    blocks = build(["--model", str(model_folder), "--window", "9", "--overlap", "2"])
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, css=CSS)
    try:
        assert "127.0.0.1" in address
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            page.goto(address)
            page.locator("input[type=file]").first.set_input_files(str(video))
            page.get_by_text("clip.mp4").first.wait_for()
            page.get_by_role("button", name="Upscale").click()
            after = page.locator(".compare img.after")
            after.wait_for(timeout=120_000)
            status = page.get_by_label("Progress").input_value()
            assert status.startswith("done: 30 frames in "), status
            box = after.bounding_box()
            assert box is not None and (box["width"], box["height"]) == (384, 256), "one pixel is one pixel"
            shots = []
            for place in ("0", "100"):
                page.locator(".compare input").evaluate(
                    "(slider, place) => { slider.value = place; slider.dispatchEvent(new Event('input')) }", place
                )
                shots.append(np.asarray(Image.open(io.BytesIO(page.locator(".frames").screenshot())).convert("RGB")))
            page.screenshot(path=str(tmp_path / "page.png"), full_page=True)
            with page.expect_download() as download:
                page.locator("a[download]").last.click()
            download.value.save_as(tmp_path / "downloaded.mp4")
            browser.close()
    finally:
        blocks.close()
    info = probe(tmp_path / "downloaded.mp4")
    assert (info.width, info.height, info.frames, info.audio_codecs) == (384, 256, 30, ("aac",))
    middle = read_video(tmp_path / "downloaded.mp4", 14, 1)[0].astype(float)
    shown_after, shown_before = (np.abs(shot[:256, :384] - middle).mean() for shot in shots)
    assert shown_after < 0.25 * shown_before, (shown_after, shown_before)

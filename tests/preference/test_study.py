"""The blind study: draws, files that name nothing, one clock, and two raters in a real browser."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from common.video_reader import read_video
from common.video_writer import VideoWriter
from preference.study.make import make_study
from preference.study.result import count, equal_answers, krippendorff_alpha
from preference.study.store import AnswerSheet, read_sheets, read_study
from preference.study.trials import QUESTIONS, Pair, Study, draw_trials
from tests.browser import CHROMIUM, BrowserPage, browser_page

ROOT = Path(__file__).parents[2]
METHODS = ("ours", "second", "third")
CLIPS = ("anna", "bert")
FRAMES, SIDE, BIT = 20, 96, 12


def barcode(number: int, level: int) -> np.ndarray:
    """A frame (96, 96, 3) of one grey level, with its number as black and white bits in the first rows."""
    frame = np.full((SIDE, SIDE, 3), level, np.uint8)
    for bit in range(5):
        frame[:BIT, bit * BIT : (bit + 1) * BIT] = 255 * (number >> bit & 1)
    return frame


def pair(clip: int, other: str) -> Pair:
    return Pair(str(clip), "ours", other, f"{clip}{other}", "ours", 8, 8, 16, 32, (2, 2), 5)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three methods, told apart by their grey, on two clips; each file's title names its method."""
    folder = tmp_path_factory.mktemp("study")
    for level, method in zip((60, 120, 180), METHODS, strict=True):
        (folder / method).mkdir()
        for clip in CLIPS:
            plain, titled = folder / "plain.mkv", folder / method / f"{clip}.mkv"
            with VideoWriter(plain, width=SIDE, height=SIDE, frame_rate=20, quality="lossless") as writer:  # type: ignore[arg-type]
                writer.write(np.stack([barcode(number, level) for number in range(FRAMES)]))
            with av.open(str(plain)) as source, av.open(str(titled), "w") as target:
                target.metadata.update(title=f"model {method}", comment=method)
                stream = target.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.dts is not None:
                        packet.stream = stream
                        target.mux(packet)
    for clip in CLIPS:
        (folder / "low" / clip).mkdir(parents=True)
        for number in range(FRAMES):
            Image.fromarray(barcode(number, 30)).resize((24, 24)).save(folder / "low" / clip / f"{number}.png")
    make_study({method: folder / method for method in METHODS}, folder / "low", folder / "study", seed=3)
    return folder / "study"


def test_sides_are_balanced_for_each_two_methods_and_drawn_per_rater() -> None:
    pairs = [pair(clip, other) for other in ("second", "third") for clip in range(7)]
    assert draw_trials(pairs, 1, "anna") == draw_trials(pairs, 1, "anna")
    assert draw_trials(pairs, 1, "anna") != draw_trials(pairs, 1, "bert") != draw_trials(pairs, 2, "bert")
    for rater in ("anna", "bert"):
        trials = draw_trials(pairs, 1, rater)
        assert sorted((trial.pair.clip, trial.pair.other) for trial in trials) == sorted(
            (p.clip, p.other) for p in pairs
        )
        lefts = Counter(trial.pair.other for trial in trials if trial.left == "ours")
        assert set(lefts.values()) <= {3, 4}
    fewer = Counter(trial.pair.other for trial in draw_trials(pairs, 1, "anna", 5))
    assert sorted(fewer.values()) == [2, 3]


def test_files_name_nothing_and_hold_the_frames(study: Path) -> None:
    key = read_study(study)
    assert {(p.clip, p.reference, p.other) for p in key.pairs} == {(c, "ours", m) for c in CLIPS for m in METHODS[1:]}
    for one in key.pairs:
        content = (study / "clips" / one.file).read_bytes()
        assert not [name for name in METHODS if name.encode() in content]
        with av.open(str(study / "clips" / one.file)) as container:
            assert container.metadata.keys() <= {"major_brand", "minor_version", "compatible_brands", "encoder"}
        frames = read_video(study / "clips" / one.file)
        below = one.other if one.top == "ours" else "ours"
        for row, method in ((0, one.top), (one.second_row, below)):
            level = frames[:, row + 20 : row + SIDE, :SIDE].mean()
            assert level == pytest.approx({"ours": 60, "second": 120, "third": 180}[method], abs=1)
    assert len({one.top == "ours" for one in key.pairs}) == 2
    shown = json.dumps([trial.shown() for trial in key.trials("anna")])
    assert not [name for name in (*METHODS, *CLIPS) if name in shown]


def test_agreement_and_interval_are_those_worked_out_by_hand() -> None:
    votes = {"a": {"x": 1, "y": 1}, "b": {"x": 1, "y": -1}, "c": {"x": 0, "y": 0}, "d": {"x": 1}}
    assert equal_answers(votes) == pytest.approx(2 / 3)
    # observed: only b differs, by 2: 2·4/(2-1)/6; expected over 1 1 1 -1 0 0: squared differences 2(3·4 + 6·1 + 2·1)/30
    assert krippendorff_alpha(votes) == pytest.approx(1 - (8 / 6) / (40 / 30))
    assert krippendorff_alpha({"a": {"x": 1, "y": 1}}) is None
    assert equal_answers({"a": {"x": 1}}) is None


def test_what_cannot_be_a_study_is_said(study: Path, tmp_path: Path) -> None:
    place = study.parent
    with pytest.raises(UserError, match="holds a study already"):
        make_study({m: place / m for m in METHODS}, place / "low", study)
    with pytest.raises(UserError, match="at least twice"):
        make_study({"ours": place / "ours"}, place / "low", tmp_path / "one")
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "anna.mkv").write_bytes((place / "ours" / "anna.mkv").read_bytes())
    with pytest.raises(UserError, match=r"short .* has no clip bert"):
        make_study({"ours": place / "ours", "short": tmp_path / "short"}, place / "low", tmp_path / "study")
    with pytest.raises(UserError, match="clip anna: ours is 20 frames of 96×96, low is 20 frames of 24×24"):
        make_study({"ours": place / "ours", "low": place / "low"}, place / "low", tmp_path / "study")
    key = read_study(study)
    for name in ("", "../key", "a b", "x" * 41):
        with pytest.raises(UserError, match="1 to 40 letters"):
            AnswerSheet(study, key, name)
    with pytest.raises(UserError, match="none that was asked for"):
        AnswerSheet(study, key, "anna").answer(0, "fidelity", "better")
    other = Study(key.identity, key.seed + 1, None, key.frame_rate, key.pairs)
    AnswerSheet(tmp_path, key, "anna").answer(0, "fidelity", "left")
    with pytest.raises(UserError, match="belongs to another study"):
        AnswerSheet(tmp_path, other, "anna")


@contextmanager
def served(study: Path, address: str) -> Iterator[None]:
    """The server as a process, killed at the end."""
    port = address.strip("/").rpartition(":")[2]
    command = [sys.executable, "-m", "preference.study", "serve", str(study), "--port", port]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with suppress(OSError), socket.create_connection(("127.0.0.1", int(port)), timeout=1):
                break
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()


#: reads frame numbers and grey levels off both canvases at each animation frame, for as long as a pass of the video
WATCH = """new Promise((resolve) => {
  const read = (id) => {
    const canvas = document.getElementById(id), context = canvas.getContext("2d"), bit = canvas.width / 8;
    const value = (x, y) => context.getImageData(Math.floor(x), Math.floor(y), 1, 1).data[0];
    let number = 0;
    for (let i = 0; i < 5; i++) if (value((i + 0.5) * bit, bit / 2) > 128) number |= 1 << i;
    return [number, value(canvas.width / 2, canvas.height / 2)];
  };
  const rows = [], end = performance.now() + 1300;
  const look = (now) => {
    rows.push([read("left"), read("right"), read("input")]);
    now < end ? requestAnimationFrame(look) : resolve(rows);
  };
  requestAnimationFrame(look);
})"""
OPEN = "document.querySelector('[data-choice]:enabled')"


PRESSED = "document.querySelectorAll('[aria-pressed=true][data-choice]').length"
#: digits pressed by each rater: a row for each pair, a digit for each question
KEYS = {"anna": ("123", "111", "223", "331"), "bert": ("321", "112", "222", "133")}


async def begin(page: BrowserPage, address: str, rater: str) -> None:
    await page.open(address)
    await page.evaluate(f"document.getElementById('rater').value = '{rater}'")
    await page.evaluate("document.querySelector('#begin button').click()")
    await page.wait("!document.getElementById('ask').hidden")


async def answer(page: BrowserPage, pair: int, digits: str, given: int = 0) -> None:
    """Answer the pair in sight, each key held for a while, and go on."""
    await page.wait(f"document.getElementById('count').textContent.startsWith('Pair {pair + 1} ') && {OPEN}")
    for number in range(given, 3):
        await page.key(digits[number], repeats=6)
        await page.wait(f"{OPEN} && {PRESSED} === {number + 1}")
    await page.key("Enter", repeats=6)


async def check_clock(page: BrowserPage, left: str, right: str) -> None:
    """Both sides show the methods drawn for them, never more than one frame apart."""
    rows = await page.evaluate(WATCH)
    levels = {"ours": 60, "second": 120, "third": 180}
    for (frame_left, level_left), (frame_right, level_right), (frame_input, level_input) in rows:
        assert abs(frame_left - frame_right) <= 1
        assert abs(frame_left - frame_input) <= 1
        assert (level_left, level_right, level_input) == pytest.approx((levels[left], levels[right], 30), abs=3)
    assert len({row[0][0] for row in rows}) > FRAMES // 3  # it plays


async def rate(study: Path, profile: Path, port: int) -> None:
    address, anna = f"http://127.0.0.1:{port}/", read_study(study).trials("anna")
    async with browser_page(profile) as page:
        with served(study, address):
            await begin(page, address, "anna")
            await page.wait(OPEN)
            await check_clock(page, anna[0].left, anna[0].right)
            await answer(page, 0, KEYS["anna"][0])
            await page.wait(f"document.getElementById('count').textContent.startsWith('Pair 2 ') && {OPEN}")
            await page.key(KEYS["anna"][1][0], repeats=20)
            await page.wait(f"{OPEN} && {PRESSED} > 0")
        # The server was killed. An answer that it misses is sent again until it is back.
        await page.key(KEYS["anna"][1][1])
        await page.wait("document.getElementById('trouble').textContent.startsWith('This answer is not kept yet')")
        with served(study, address):
            await page.wait(f"{OPEN} && {PRESSED} === 2")
            await page.reload()
            await page.wait(f"!document.getElementById('ask').hidden && {PRESSED} === 2")
            await answer(page, 1, KEYS["anna"][1], given=2)
            for pair in (2, 3):
                await answer(page, pair, KEYS["anna"][pair])
            await page.wait("!document.getElementById('end').hidden")
            await begin(page, address, "bert")
            for pair, digits in enumerate(KEYS["bert"]):
                await answer(page, pair, digits)
            await page.wait("!document.getElementById('end').hidden")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_two_raters_a_crash_a_reload_and_held_keys_give_the_hand_count(study: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asyncio.run(rate(study, tmp_path / "profile", port))
    key = read_study(study)
    sheets = read_sheets(study, key)
    expected: Counter[tuple[str, str, str]] = Counter()
    for rater, rows in KEYS.items():
        for trial, digits in zip(key.trials(rater), rows, strict=True):
            for question, digit in zip(QUESTIONS, digits, strict=True):
                chosen = {"1": trial.left, "2": None, "3": trial.right}[digit]
                expected[trial.pair.other, question, "same" if chosen is None else chosen] += 1
    counts = count(sheets)
    assert len(counts) == 6
    for row in counts:
        found = [expected[row.other, row.question, chosen] for chosen in ("ours", "same", row.other)]
        assert [row.good, row.same, row.bad] == found
        assert row.raters == 2 and sum(found) == 4
        assert row.score == pytest.approx((found[0] - found[2]) / 4)
        assert row.low is not None and row.high is not None and row.low <= row.score <= row.high
    done = subprocess.run(
        [sys.executable, "-m", "preference.study", "result", str(study), "--output", str(tmp_path / "result.json")],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "2 rater(s)" in done.stdout and "too narrow" in done.stdout
    assert json.loads((tmp_path / "result.json").read_text())["rows"] == [row.document() for row in counts]

"""metrics.compare on real frames: the table, what is missing, and a run that is killed and goes on."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import bootstrap
from torch import Tensor

from common.errors import StorageError, UserError
from metrics import compare
from metrics.bootstrap import estimate, interval
from metrics.clips import load_clip
from metrics.comparison.clip_sets import gather_sets, parse_methods
from metrics.comparison.summary import Row
from metrics.comparison.tables import latex_escaped
from metrics.registry import METRICS, create
from tests.commands import start

ROOT = Path(__file__).parents[2]
CLIPS = 5


@pytest.fixture(scope="module")
def frames(real_clip: Tensor) -> np.ndarray:
    return (real_clip[:2] * 255).round().byte().permute(0, 2, 3, 1).numpy()


@pytest.fixture
def folders(frames: np.ndarray, tmp_path: Path) -> Path:
    """hr/N, and out/METHOD/real/N, N = 1, 2, …: `good` adds little noise, `poor` much, `same` as much as good."""
    random = np.random.default_rng(0)
    for clip in range(1, CLIPS + 1):
        crop = frames[:, :96, 40 * clip : 40 * clip + 128]
        write(tmp_path / f"hr/{clip}", crop)
        for method, sigma in (("good", 4.0), ("poor", 12.0), ("same", 4.0)):
            noise = random.normal(0, sigma + clip / 5, crop.shape)
            write(tmp_path / f"out/{method}/real/{clip}", np.clip(crop + noise, 0, 255).astype(np.uint8))
    return tmp_path


def write(folder: Path, clip: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for index, frame in enumerate(clip):
        Image.fromarray(frame).save(folder / f"{index}.png")


def options(folders: Path, *extra: object, methods: tuple[str, ...] = ("good", "poor", "same")) -> list[str]:
    line: list[object] = []
    for method in methods:
        line += ["--method", f"{method}={folders}/out/{method}"]
    return [*map(str, [*line, "--set", f"real={folders}/hr", "--metrics", "psnr,ssim,temporal_own", *extra])]


def run(monkeypatch: pytest.MonkeyPatch, *line: object) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, line)])
    compare.main()


def test_the_interval_agrees_with_scipy_and_with_a_loop() -> None:
    values = np.random.default_rng(1).gamma(2.0, 3.0, 40)
    low, high = interval(values)
    theirs = bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=np.random.default_rng(2))
    tolerance = 0.05 * (high - low)
    assert low == pytest.approx(theirs.confidence_interval.low, abs=tolerance)
    assert high == pytest.approx(theirs.confidence_interval.high, abs=tolerance)
    draws = np.random.default_rng(0).integers(0, 40, (2000, 40))
    means = sorted(sum(values[i] for i in draw) / 40 for draw in draws)
    assert low == pytest.approx(means[49] + 0.975 * (means[50] - means[49]))  # 0.025 · 1999 = 49.975
    assert high == pytest.approx(means[1949] + 0.025 * (means[1950] - means[1949]))


def test_best_is_told_only_beyond_chance() -> None:
    random = np.random.default_rng(0)
    clip = random.normal(20, 5, 30)  # differs from clip to clip far more than the methods do
    values = {"a": clip + 0.5, "b": clip + random.normal(0, 0.1, 30), "c": clip + random.normal(0, 0.1, 30) - 0.001}
    psnr = Row("s", METRICS["psnr"], values)
    assert psnr.marks() == {"a": "best", "b": "second", "c": ""}, "paired: the spread of clips does not count"
    assert Row("s", METRICS["psnr"], {k: values[k] for k in "bc"}).marks() == {"b": "tied", "c": "second"}
    niqe = Row("s", METRICS["niqe"], values).marks()
    assert niqe["a"] == "" and set(niqe.values()) == {"tied", "second", ""}
    one = Row("s", METRICS["psnr"], {name: found[:1] for name, found in values.items()})
    assert "best" not in one.marks().values() and estimate(values["a"][:1]).low is None


def test_the_table_holds_what_the_metrics_give(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folders / "out/good.method.yaml").write_text("seconds: 11.3\nparameters_b: 1.3\n")
    run(monkeypatch, *options(folders, "--output", folders / "c", "--reference-method", "poor"))
    result = json.loads((folders / "c/compare.json").read_text())
    assert result["sets"]["real"]["clips"] == ["1", "2", "3", "4", "5"]
    for name in ("psnr", "temporal_own"):
        metric, values = create(name), {}
        for method in ("good", "poor"):
            clips = [load_clip(folders / f"out/{method}/real/{clip}") for clip in range(1, CLIPS + 1)]
            truth = [load_clip(folders / f"hr/{clip}") for clip in range(1, CLIPS + 1)]
            values[method] = np.array([metric(x, y) for x, y in zip(clips, truth, strict=True)])
            assert [result["per_clip"]["real"][method][str(c)][name] for c in range(1, 6)] == list(values[method])
        (row,) = [row for row in result["results"] if row["metric"] == name]
        assert row["methods"]["good"]["mean"] == pytest.approx(values["good"].mean())
        difference = row["methods"]["good"]["difference_to_poor"]
        assert difference["mean"] == pytest.approx((values["good"] - values["poor"]).mean())
        assert [difference["low"], difference["high"]] == list(interval(values["good"] - values["poor"]))
    (psnr,) = [row for row in csv.DictReader((folders / "c/compare.csv").open()) if row["method"] == "good"][:1]
    assert psnr["metric"] == "psnr" and float(psnr["difference"]) > 0 and psnr["seconds"] == "11.3"
    text, tex = (folders / "c/compare.md").read_text(), (folders / "c/compare.tex").read_text()
    assert "| seconds | 11.3 | – | – |" in text and "Paired differences to poor" in text
    assert "real (5)" in text and "psnr" not in text and "PSNR ↑" in text
    assert "real: intervals over 5 clips are too narrow" in text
    table = tex[tex.index(r"\toprule") : tex.index(r"\bottomrule")]
    lines = [line for line in table.splitlines() if line.endswith(r"\\")]
    assert {line.count("&") for line in lines} == {4} and len(lines) == 1 + 3 + 2
    assert latex_escaped("a_b 5% ↑") == r"a\_b 5\% $\uparrow$"


def test_a_killed_run_goes_on_and_gives_the_same_table(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, *options(folders, "--output", folders / "whole"))
    cache = folders / "cut/cache"
    running = start("-m", "metrics.compare", *options(folders, "--output", folders / "cut"), warm=False)
    while len(list(cache.rglob("[!.]*.json"))) < 6 and running.poll() is None:
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL, "it ended before it could be killed"
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("[!.]*.json")}
    assert 6 <= len(before) < 3 * CLIPS * 3 and not (folders / "cut/compare.json").exists()
    run(monkeypatch, *options(folders, "--output", folders / "cut"))
    assert {path: path.stat().st_mtime_ns for path in before} == before, "kept scores were computed again"
    for name in ("compare.json", "compare.csv", "compare.md", "compare.tex"):
        assert (folders / "cut" / name).read_bytes() == (folders / "whole" / name).read_bytes()


def test_what_a_kept_score_depends_on(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def counts(*extra: object, methods: tuple[str, ...] = ("good", "poor")) -> tuple[int, int]:
        run(monkeypatch, *options(folders, "--output", folders / "c", *extra, methods=methods))
        found = re.search(r"(\d+) scores computed, (\d+) found", capsys.readouterr().err)
        assert found
        return int(found[1]), int(found[2])

    each = CLIPS * 3
    assert counts() == (2 * each, 0)
    assert counts() == (0, 2 * each)
    assert counts(methods=("good", "poor", "same")) == (each, 2 * each), "a new method costs itself"
    assert counts("--crop-border", 4) == (2 * each, 0)
    for folder in ("hr", "out/good/real"):  # a copy elsewhere is the same clip
        shutil.move(folders / folder / "1", folders / "moved")
        shutil.copytree(folders / "moved", folders / folder / "1")
        shutil.rmtree(folders / "moved")
    assert counts() == (0, 2 * each)
    damage(folders / "hr/1/0.png")
    assert counts() == (2 * 2, 2 * each - 4), "no-reference scores do not depend on the HR clip"
    damage(folders / "out/good/real/2/0.png")
    assert counts() == (3, 2 * each - 3)
    monkeypatch.setattr(METRICS["psnr"], "version", 99)
    assert counts() == (2 * CLIPS, 2 * each - 2 * CLIPS)


def damage(path: Path) -> None:
    with Image.open(path) as picture:
        pixels = np.array(picture)
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(path)


def test_missing_clips_are_named_and_never_averaged_away(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(folders / "out/poor/real/2")
    shutil.rmtree(folders / "hr/5")
    line = options(folders, "--output", folders / "c", methods=("good", "poor"))
    with pytest.raises(UserError, match=r"HR lacks 1 of the clips of real \(5\); poor lacks 1 .* \(2\)"):
        run(monkeypatch, *line)
    assert not (folders / "c").exists()
    run(monkeypatch, *line, "--allow-missing")
    result = json.loads((folders / "c/compare.json").read_text())
    assert result["sets"]["real"]["clips"] == ["1", "3", "4"]
    assert result["sets"]["real"]["missing"] == {"HR": ["5"], "poor": ["2"]}
    assert set(result["per_clip"]["real"]["good"]) == {"1", "3", "4"}
    assert "only the 3 clips that all have are compared; HR lacks 5; poor lacks 2." in capsys.readouterr().out


def test_a_count_that_differs_from_the_published_set_is_said(folders: Path) -> None:
    methods = parse_methods([f"good={folders}/out/good/real"])
    (small,) = gather_sets([f"UDM10={folders}/hr"], methods, allow_missing=False)
    assert small.remarks == ["UDM10 has 5 clips here, 10 as published."]
    for folder in ("hr", "out/good/real"):
        for clip in range(6, 11):
            shutil.copytree(folders / folder / "1", folders / folder / str(clip))
    (whole,) = gather_sets([f"UDM10={folders}/hr"], methods, allow_missing=False)
    assert whole.remarks == [] and whole.clips[-1] == "10"


def test_a_set_without_hr_clips_gets_its_no_reference_metrics(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("good", "poor"):
        shutil.copytree(folders / f"out/{method}/real", folders / f"out/{method}/VideoLQ")
    line = options(folders, "--output", folders / "c", "--set", "VideoLQ", methods=("good", "poor"))
    run(monkeypatch, *line)
    result = json.loads((folders / "c/compare.json").read_text())
    table, tex = (folders / "c/compare.md").read_text(), (folders / "c/compare.tex").read_text()
    for row in result["results"]:
        mean = row["methods"]["good"]["mean"]
        digits = 2 if max(values["mean"] for values in row["methods"].values()) >= 2 else 4
        assert row["methods"]["good"]["mark"] == "best" and row["methods"]["poor"]["mark"] == "second"
        assert f"| **{mean:.{digits}f} (" in table and rf"\textbf{{{mean:.{digits}f}}} & \underline" in tex
    found = Counter((row["set"], row["metric"]) for row in result["results"])
    assert found == Counter([*(("real", n) for n in ("psnr", "ssim", "temporal_own")), ("VideoLQ", "temporal_own")])
    with pytest.raises(UserError, match="VideoLQ has no HR clips, and psnr need them"):
        run(monkeypatch, *line, "--metrics", "psnr")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("--method", "good"), "give NAME=FOLDER"),
        (("--method", "new=absent"), "no folder absent"),
        (("--method", "good=out/good"), "every name once"),
        (("--set", "real"), "every name once"),
        (("--set", "other=hr"), "no file or folder .*good/other"),
        (("--reference-method", "gone"), "choose good, poor"),
        (("--crop-border", "50"), "a border of 50 px leaves nothing"),
        (("--crop-border", "-1"), "at least 0"),
        (("--method", "bad=out/bad"), r"bad\.method\.yaml must be a mapping"),
    ],
)
def test_mistakes_are_one_clear_error(
    folders: Path, monkeypatch: pytest.MonkeyPatch, line: tuple[str, ...], message: str
) -> None:
    (folders / "out/bad").mkdir()
    (folders / "out/bad.method.yaml").write_text("speed: 3\n")
    monkeypatch.chdir(folders)
    with pytest.raises(UserError, match=message):
        run(monkeypatch, *options(Path(), methods=("good", "poor")), "--output", "c", *line)
    assert not os.path.exists("c/compare.json")


def test_another_length_is_an_error_with_its_remedy(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folders / "out/good/real/1/1.png").unlink()
    line = options(folders, "--output", folders / "c", methods=("good",))
    with pytest.raises(UserError, match=r"is 1 frames of 128×96, but its reference .* --max-frames N"):
        run(monkeypatch, *line)
    run(monkeypatch, *line, "--metrics", "psnr", "--max-frames", 1)
    (row,) = json.loads((folders / "c/compare.json").read_text())["results"]
    assert row["methods"]["good"]["mean"] > 20


def test_a_server_that_does_not_answer_is_no_missing_file(tmp_path: Path) -> None:
    def place(address: str) -> Path:
        if ".method." in address:
            raise StorageError(f"{address} is out of reach")
        return tmp_path

    with pytest.raises(StorageError, match="out of reach"):
        parse_methods(["ours=s3://bucket/ours"], place)

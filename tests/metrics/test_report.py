"""The report page: self-contained, right about directions, the same bytes every time, clear about bad
input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from metrics.report.description import ReportDescription, Series
from metrics.report.images import read_series, running_mean
from metrics.report.page import build_report, comparison, duration_text, read_description


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for name in ("bicubic", "student"):
        pixels = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    lines = [{"stage": "base", "step": step, "loss": 1.0 / (1 + step)} for step in range(50)]
    lines.append({"stage": "dual_stream", "step": 0, "loss": 9.0})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 51, "lo')
    return tmp_path


def description(**changes: object) -> ReportDescription:
    document = {
        "title": "Tiny <preset>",
        "scenes": [
            {
                "frames": [{"label": "bicubic", "image": "bicubic.png"}, {"label": "student", "image": "student.png"}],
                "crops": [[4, 4, 8, 8]],
                "compare": ["bicubic", "student"],
            }
        ],
        "curves": [
            {
                "title": "base",
                "series": [{"label": "l", "file": "metrics.jsonl", "y": "loss", "where": {"stage": "base"}}],
            }
        ],
        "methods": {"bicubic": {"psnr": 28.0, "gmsd": 0.2}, "student": {"psnr": 29.0, "gmsd": 0.1}},
        "seconds": {"base": 240.0},
        "published": True,
        "notes": ["On two cores."],
    }
    return ReportDescription.model_validate(document | changes)


def test_page_is_one_file_and_repeats_to_the_byte(folder: Path) -> None:
    for name in ("a.html", "b.html"):
        build_report(description(), folder / name, folder)
    page = (folder / "a.html").read_text()
    assert page == (folder / "b.html").read_text()
    assert "Tiny &lt;preset&gt;" in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 2 + 2 + 2 * 2  # slider, frames, crops at two sizes
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r'(href|src)="(?!data:|#)', page)
    assert "DUO-VSR, not measured here" in page
    assert [path.name for path in folder.glob("*.partial")] == []


def test_best_value_follows_the_metric_direction() -> None:
    table = comparison(
        {"a": {"psnr": 30.0, "gmsd": 0.2, "seconds": 1.0}, "b": {"psnr": 28.0, "gmsd": 0.1, "seconds": None}}
    )
    assert table == {
        "columns": ["PSNR ↑", "GMSD ↓", "seconds"],
        "rows": [
            ("a", [("30.00", True), ("0.2000", False), ("1.00", False)]),
            ("b", [("28.00", False), ("0.1000", True), ("–", False)]),
        ],
    }


def test_series_takes_its_own_lines_and_forgives_a_cut_last_one(folder: Path) -> None:
    series = Series(label="l", file=Path("metrics.jsonl"), y="loss", where={"stage": "base"})
    x, y = read_series(series, folder)
    assert x.tolist() == list(range(50))
    assert y[4] == pytest.approx(0.2)


def test_running_mean_is_the_mean_of_what_came_before() -> None:
    values = np.array([4.0, 2.0, 0.0, 8.0])
    assert running_mean(values, 2).tolist() == [4.0, 3.0, 1.0, 4.0]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.424, "0.42 s"), (59.96, "60.0 s"), (245.4, "4 min 05 s"), (3725, "1 h 02 min")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scenes": [{"frames": [{"label": "x", "image": "absent.png"}]}]}, "no image .*absent.png"),
        ({"scenes": [{"frames": [{"label": "x", "image": "metrics.jsonl"}]}]}, "not a readable image"),
        (
            {"scenes": [{"frames": [{"label": "x", "image": "student.png"}], "compare": ["x", "y"]}]},
            "compare names the frame 'y'",
        ),
        (
            {"scenes": [{"frames": [{"label": "x", "image": "student.png"}], "crops": [[30, 0, 8, 8]]}]},
            "outside .*student.png",
        ),
        (
            {"curves": [{"title": "c", "series": [{"label": "l", "file": "metrics.jsonl", "y": "nothing"}]}]},
            "has no line with step and nothing",
        ),
    ],
)
def test_bad_input_is_named_and_leaves_no_page(folder: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_report(description(**changes), folder / "report.html", folder)
    assert not (folder / "report.html").exists()


def test_unknown_key_of_a_description_is_named(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text('{"title": "t", "sceness": []}')
    with pytest.raises(UserError, match="sceness"):
        read_description(path)

"""README.md and docs/effect.md say what benchmarks/results/effect holds."""

from __future__ import annotations

import json

from tests.commands import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "effect"
#: of README.md's table -> method in scores.json
METHODS = {
    "bicubic": "bicubic",
    "bicubic, sharpened": "bicubic-sharpened",
    "Real-ESRGAN x4plus": "realesrgan-x4plus",
    "Real-ESRGAN animevideov3": "realesr-animevideov3-x4",
    "`assets/small` without its DiT: a convolutional prediction": "prediction",
    "`assets/small`, one step": "shipped",
    "truth": "truth",
}
#: in the order of its columns -> digits
METRICS = {"psnr": 2, "cvvdp": 2, "vmaf_neg": 1, "niqe": 1, "temporal": 2}


def test_the_readme_has_the_means_of_the_scores() -> None:
    methods = json.loads((RESULTS / "scores.json").read_text())["methods"]
    lines = (ROOT / "README.md").read_text().splitlines()
    (begins,) = [number for number, line in enumerate(lines) if line.startswith("| | PSNR ↑ | ColorVideoVDP ↑")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[begins + 2 : begins + 2 + len(METHODS)]]
    assert [row[0] for row in rows] == list(METHODS)
    for name, *cells, _ in rows:
        means = methods[METHODS[name]]
        shown = [f"{means[metric]:.{digits}f}" for metric, digits in METRICS.items()]
        assert cells == (["–", *shown[1:]] if name == "truth" else shown), name


def test_the_page_has_the_tables_of_the_results() -> None:
    text = (ROOT / "docs" / "effect.md").read_text()
    for file in sorted(RESULTS.glob("*.md")):
        for table in file.read_text().strip().split("\n\n"):
            assert table in text, f"docs/effect.md lacks a table of {file.name}"

"""One self-contained HTML page from a plain description: images, 1:1 crops, curves, tables, times, notes.

    python -m metrics.report --description report.json --output report.html

or `build_report(ReportDescription(...), output)`. Images are embedded, so the page is one file; relative
paths in the description are meant from its own folder. The description (unknown keys are errors):

    {
      "title": "...", "subtitle": "...",
      "summary": ["paragraph", ...],
      "scenes": [{                                     side-by-side frames and crops of one moment
        "title": "...", "caption": "...",
        "frames": [{"label": "bicubic", "image": "frames/bicubic.png", "note": "28.1 dB"}, ...],
        "crops": [[x, y, width, height], ...],         px in the frames, shown 1:1 and doubled
        "compare": ["bicubic", "one step"]}],          labels of two frames behind a slider
      "curves": [{
        "title": "Stage II", "caption": "...", "x_label": "step", "log_y": false,
        "series": [{"label": "DMD", "file": "metrics.jsonl", "x": "step", "y": "loss_dmd",
                    "where": {"stage": "dual_stream"}}, ...]}],
      "methods": {"bicubic": {"psnr": 28.1, "dit_evaluations": 0, "seconds": 0.01}, ...},
      "methods_title": "...", "methods_note": "...",
      "tables": [{"title": "...", "columns": [...], "rows": [[...], ...], "note": "..."}],
      "seconds": {"shards": 31.2, "base": 240.0, ...},
      "published": true,                               the authors' table, labelled so
      "notes": ["paragraph", ...]
    }

Every key but `title` may be absent. `methods` has the shape of `methods` in metrics.json; columns that
metrics/registry.py knows get their direction and their best value is set in bold.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jinja2
from pydantic import ValidationError

from common.atomic import write_atomic
from common.errors import UserError
from metrics.published import load_published
from metrics.registry import METRICS
from metrics.report.description import ReportDescription, Scene
from metrics.report.images import crop_uri, curve_svg, image_uri

#: columns beside metrics, with their heading
_OTHER_COLUMNS = {"dit_evaluations": "DiT evaluations", "seconds": "seconds", "parameters_b": "parameters (B)"}


def build_report(description: ReportDescription, output: Path, base: Path | None = None) -> None:
    """Write the page to `output`, atomically.

    Args:
        base: folder that relative paths of the description start from; the working directory by default.

    Raises:
        UserError: an image or a log that is missing or unreadable, a crop outside its frame.
    """
    base = base or Path()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        report=description,
        scenes=[_scene(scene, base) for scene in description.scenes],
        curves=[{"curve": curve, "svg": curve_svg(curve, base)} for curve in description.curves],
        methods=comparison(description.methods),
        seconds=_bars(description.seconds),
        published=_published() if description.published else None,
    )
    write_atomic(output, page)


def comparison(methods: dict[str, dict[str, float | int | None]]) -> dict[str, Any] | None:
    """Headings and cells of a table of methods; a cell is (text, whether it is the column's best)."""
    if not methods:
        return None
    columns = list(dict.fromkeys(name for values in methods.values() for name in values))
    best = {}
    for column in columns:
        values = [row[column] for row in methods.values() if row.get(column) is not None]
        if column in METRICS and len(values) > 1:
            best[column] = (min if METRICS[column].lower_is_better else max)(values)  # type: ignore[type-var]
    rows = [
        (name, [(_number(row.get(c)), c in best and row.get(c) == best[c]) for c in columns])
        for name, row in methods.items()
    ]
    return {"columns": [_heading(column) for column in columns], "rows": rows}


def _heading(column: str) -> str:
    entry = METRICS.get(column)
    if entry is None:
        return _OTHER_COLUMNS.get(column, column.replace("_", " "))
    return f"{entry.label} {'↓' if entry.lower_is_better else '↑'}"


def _number(value: float | int | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, int):
        return str(value)
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.4f}"


def _scene(scene: Scene, base: Path) -> dict[str, Any]:
    frames = [(frame, base / frame.image) for frame in scene.frames]
    paths = {frame.label: path for frame, path in frames}
    unknown = [label for label in scene.compare or () if label not in paths]
    if unknown:
        raise UserError(f"compare names the frame {unknown[0]!r}; the scene has {', '.join(paths)}")
    return {
        "scene": scene,
        "compare": [(label, image_uri(paths[label])) for label in scene.compare or ()],
        "frames": [(frame, image_uri(path)) for frame, path in frames],
        "crops": [[(frame, crop_uri(path, box)) for frame, path in frames] for box in scene.crops],
    }


def _bars(seconds: dict[str, float]) -> list[tuple[str, str, float]]:
    """(name, text, share of the longest in percent)."""
    longest = max(seconds.values(), default=0.0) or 1.0
    return [(name, duration_text(value), 100 * value / longest) for name, value in seconds.items()]


def duration_text(seconds: float) -> str:
    """For instance 0.42 s, 31.2 s, 4 min 05 s, 1 h 02 min."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _published() -> dict[str, Any]:
    published = load_published()
    table = published.tables[0]
    rows: dict[str, dict[str, float | int | None]] = {name: dict(row) for name, row in table.rows.items()}
    return {"label": published.label, "note": published.note, "table": comparison(rows)}


def read_description(path: Path) -> ReportDescription:
    """Read a JSON description.

    Raises:
        UserError: missing or invalid, naming the field.
    """
    try:
        return ReportDescription.model_validate_json(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no report description {path}") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {field or 'the file'}: {first['msg']}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description="Build a self-contained HTML report.")
    parser.add_argument("--description", type=Path, required=True, help="JSON description")
    parser.add_argument("--output", type=Path, required=True, help="HTML file to write")
    arguments = parser.parse_args()
    description = read_description(arguments.description)
    build_report(description, arguments.output, arguments.description.parent)
    print(f"written to {arguments.output}")

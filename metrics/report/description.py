"""What a report shows, as data; metrics/report/page.py explains every key by an example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from common.config import Section


class Frame(Section):
    """An image and what to call it."""

    label: str
    image: Path
    note: str = ""


class Scene(Section):
    """Frames of one moment by several methods, all of one size, places to look at closely, and two labels to
    lay over each other behind a slider."""

    title: str = ""
    caption: str = ""
    frames: tuple[Frame, ...] = Field(min_length=1)
    crops: tuple[tuple[int, int, int, int], ...] = ()
    compare: tuple[str, str] | None = None


class Series(Section):
    """One line of a plot: `y` over `x` of the JSON lines in `file` whose fields equal `where`."""

    label: str
    file: Path
    x: str = "step"
    y: str
    where: dict[str, Any] = Field(default_factory=dict)


class Curve(Section):
    """One plot."""

    title: str
    caption: str = ""
    x_label: str = "step"
    log_y: bool = False
    series: tuple[Series, ...] = Field(min_length=1)


class PlainTable(Section):
    """A table as it stands."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | float | None, ...], ...]
    note: str = ""


class ReportDescription(Section):
    """What the page shows; unknown keys are errors."""

    title: str
    subtitle: str = ""
    summary: tuple[str, ...] = ()
    scenes: tuple[Scene, ...] = ()
    curves: tuple[Curve, ...] = ()
    methods: dict[str, dict[str, float | int | None]] = Field(default_factory=dict)
    methods_title: str = "Figures"
    methods_note: str = ""
    tables: tuple[PlainTable, ...] = ()
    seconds: dict[str, float] = Field(default_factory=dict)
    published: bool = False
    notes: tuple[str, ...] = ()

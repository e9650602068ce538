"""The figures DUO-VSR's authors printed (published.json), to set beside ours and never to pass as ours."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PublishedTable:
    """One printed table: `rows[method][metric]`, metric names as in metrics/registry.py."""

    key: str
    title: str
    rows: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Published:
    """All printed tables, with the label and the note they are always shown under."""

    label: str
    note: str
    tables: tuple[PublishedTable, ...]


def load_published() -> Published:
    """Read published.json."""
    document = json.loads(Path(__file__).with_name("published.json").read_text())
    tables = tuple(PublishedTable(**table) for table in document["tables"])
    return Published(document["label"], document["note"], tables)

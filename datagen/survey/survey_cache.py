"""The survey of all sources, kept in parts: a job that is run again surveys only what is not finished."""

from __future__ import annotations

import hashlib
import itertools
import json
from typing import Any

from common.progress import progress
from common.storage import Folder
from datagen.config import DatagenConfig
from datagen.encode.ray_jobs import survey_rows
from datagen.format_revision import SURVEY_REVISION
from datagen.sources import Source

SOURCES_PER_PART = 64


def survey_all(folder: Folder, sources: list[Source], config: DatagenConfig) -> list[dict[str, Any]]:
    """Surveys of all sources in order, taken from finished parts where there are any."""
    parts = [sources[first : first + SOURCES_PER_PART] for first in range(0, len(sources), SOURCES_PER_PART)]
    done: dict[int, list[dict[str, Any]]] = {}
    for index, part in enumerate(parts):
        try:
            saved = json.loads(folder.read(_part_name(index)))
        except (FileNotFoundError, NotADirectoryError):
            continue
        if saved["of"] == _part_hash(part, config):
            done[index] = saved["surveys"]
    missing = [index for index in range(len(parts)) if index not in done]
    todo = [source for index in missing for source in parts[index]]
    if todo:
        rows = survey_rows(todo, config)
        unreadable = 0
        with progress(len(todo), "survey", "sources") as bar:
            for index in missing:
                surveys = []
                for row in itertools.islice(rows, len(parts[index])):
                    surveys.append(row)
                    unreadable += "error" in row
                    bar.advance(1, unreadable=unreadable)
                saved = {"of": _part_hash(parts[index], config), "surveys": surveys}
                folder.write(_part_name(index), json.dumps(saved).encode())
                done[index] = surveys
    paths = {source.id: source.path for source in sources}
    surveys = [survey for index in range(len(parts)) for survey in done[index]]
    return [survey | {"path": paths[survey["source"]]} for survey in surveys]


def _part_name(index: int) -> str:
    return f"survey/part-{index:06d}.json"


def _part_hash(part: list[Source], config: DatagenConfig) -> str:
    sources = [(source.id, source.caption) for source in part]
    identity = [sources, config.clip.model_dump(mode="json"), SURVEY_REVISION]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

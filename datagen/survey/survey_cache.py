"""The survey of all sources, on Ray, saved per 64 sources: run again, a job surveys only what is not finished."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from common.errors import UserError
from common.fingerprint import fingerprint
from common.progress import progress
from common.storage import Folder, StorageConfig
from datagen.config import DatagenConfig
from datagen.format_revision import SURVEY_REVISION
from datagen.ray_cluster import MAX_RETRIES, dataset_of, iterate_rows, text_array
from datagen.sources import Source
from datagen.survey.decoder_process import survey_isolated
from datagen.survey.source_survey import SourceSurvey, Unreadable, from_document, to_document

SOURCES_PER_FILE = 64

Survey = SourceSurvey | Unreadable


def survey_all(folder: Folder, sources: list[Source], config: DatagenConfig, storage: StorageConfig) -> list[Survey]:
    """Surveys of all sources in order, taken from finished files where there are any."""
    groups = [sources[first : first + SOURCES_PER_FILE] for first in range(0, len(sources), SOURCES_PER_FILE)]
    done: dict[int, list[Survey]] = {}
    for index, group in enumerate(groups):
        saved = _read(folder, index, group, config)
        if saved is not None:
            done[index] = saved
    missing = [index for index in range(len(groups)) if index not in done]
    if missing:
        surveys = _survey([source for index in missing for source in groups[index]], config, storage)
        unreadable = 0
        with progress(sum(len(groups[index]) for index in missing), "survey", "sources") as bar:
            for index in missing:
                done[index] = []
                for found in itertools.islice(surveys, len(groups[index])):
                    done[index].append(found)
                    unreadable += isinstance(found, Unreadable)
                    bar.advance(1, unreadable=unreadable)
                documents = [to_document(found) for found in done[index]]
                saved_as = {"of": _identity(groups[index], config), "surveys": documents}
                folder.write(_name(index), json.dumps(saved_as).encode())
    return [found for index in range(len(groups)) for found in done[index]]


def _survey(sources: list[Source], config: DatagenConfig, storage: StorageConfig) -> Iterator[Survey]:
    """The Ray job: a survey of each source, in order."""

    def work(table: pa.Table) -> pa.Table:
        surveys = [_of(Source(row["id"], row["path"]), config, storage) for row in table.to_pylist()]
        return pa.table({"survey": text_array([json.dumps(to_document(found)) for found in surveys])})

    rows = [{"id": source.id, "path": source.path} for source in sources]
    dataset = dataset_of(rows).map_batches(
        work, batch_size=1, batch_format="pyarrow", num_cpus=1, max_retries=MAX_RETRIES
    )
    for source, row in zip(sources, iterate_rows(dataset), strict=True):
        yield from_document(json.loads(row["survey"]), source)


def _of(source: Source, config: DatagenConfig, storage: StorageConfig) -> Survey:
    try:
        return survey_isolated(source, config, storage)
    except UserError as error:
        return Unreadable(source, str(error))
    except Exception as error:
        return Unreadable(source, f"{source.id}: {type(error).__name__}: {error}")


def _read(folder: Folder, index: int, group: list[Source], config: DatagenConfig) -> list[Survey] | None:
    try:
        saved: dict[str, Any] = json.loads(folder.read(_name(index)))
    except (FileNotFoundError, NotADirectoryError):
        return None
    if saved["of"] != _identity(group, config):
        return None
    return [from_document(document, source) for document, source in zip(saved["surveys"], group, strict=True)]


def _name(index: int) -> str:
    return f"survey/part-{index:06d}.json"


def _identity(group: list[Source], config: DatagenConfig) -> str:
    sources = [(source.id, source.caption) for source in group]
    return fingerprint([sources, config.clip.model_dump(mode="json"), SURVEY_REVISION])

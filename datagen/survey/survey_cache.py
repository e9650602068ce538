"""Surveys of all sources, on Ray, kept in `survey/`: run again, a job surveys only what it has no survey of.

A file holds up to 64 surveys in the order in which they were made. Each is found by a hash of the source's name, its
file's version and all that decides what is measured. So a source that was added or has changed costs its own survey.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pyarrow as pa

from common.errors import StorageError, UserError
from common.fingerprint import fingerprint
from common.progress import progress
from common.storage import Folder, StorageConfig
from datagen.config import DatagenConfig
from datagen.format_revision import SURVEY_REVISION
from datagen.ray_cluster import MAX_RETRIES, dataset_of, iterate_rows, text_array
from datagen.sources import Source
from datagen.survey.decoder_process import survey_isolated
from datagen.survey.source_survey import SourceSurvey, Unreadable, from_document, to_document

SURVEYS_PER_FILE = 64
#: requests at once [ours]
READERS = 16
NO_UTF8 = "its name is no UTF-8, which metadata are written in; rename it"

Survey = SourceSurvey | Unreadable


def survey_all(
    folder: Folder,
    sources: list[Source],
    config: DatagenConfig,
    storage: StorageConfig,
    start_ray: Callable[[], None],
    *,
    earlier: Folder | None = None,
    look_again: bool = False,
    check: Callable[[list[Unreadable]], None] = lambda unreadable: None,
) -> list[Survey]:
    """Surveys of all sources in order, taken from finished files where there are any.

    Args:
        start_ray: called where something has to be surveyed.
        earlier: a dataset whose surveys are taken over, of sources that it could reach; they are kept here too.
        look_again: survey sources anew that were out of reach, as long as no plan relies on it.
        check: called with what is unreadable so far, before and after each file of surveys; raises to stop.
    """
    keys = survey_keys(sources, config)
    files = _files(folder)
    done = _read(folder, files, dict(zip(keys, sources, strict=True)))
    done |= {key: Unreadable(source, NO_UTF8) for key, source in zip(keys, sources, strict=True) if not source.is_utf8}
    if look_again:
        done = _reached(done)
    missing = [index for index, key in enumerate(keys) if key not in done]
    if missing:
        unreadable = [found for found in done.values() if isinstance(found, Unreadable)]
        check(unreadable)
        wanted = {keys[index]: sources[index] for index in missing}
        theirs = _read(earlier, _files(earlier), wanted) if earlier is not None else {}
        taken = _reached(theirs)
        to_survey = [source for key, source in wanted.items() if key not in taken]
        if to_survey:
            start_ray()
        numbers = itertools.count(_number(files[-1]) + 1 if files else 0)
        with (
            closing(_survey(to_survey, config, storage)) as surveys,
            progress(len(missing), "survey", "sources") as bar,
        ):
            for first in range(0, len(missing), SURVEYS_PER_FILE):
                documents = []
                for index in missing[first : first + SURVEYS_PER_FILE]:
                    key = keys[index]
                    found = done[key] = taken[key] if key in taken else next(surveys)
                    documents.append({"of": key} | to_document(found))
                    unreadable += [found] if isinstance(found, Unreadable) else []
                    bar.advance(1, unreadable=len(unreadable))
                folder.write(f"survey/part-{next(numbers):06d}.json", json.dumps({"surveys": documents}).encode())
                check(unreadable)
    return [done[key] for key in keys]


def survey_keys(sources: list[Source], config: DatagenConfig) -> list[str]:
    """What a source's survey is found by."""
    measured = fingerprint([config.clip.model_dump(mode="json"), SURVEY_REVISION])
    texts = (json.dumps([measured, source.id, source.version]) for source in sources)
    return [hashlib.sha256(text.encode()).hexdigest()[:32] for text in texts]


def _reached(surveys: dict[str, Survey]) -> dict[str, Survey]:
    """Those of sources that were not out of reach."""
    return {key: found for key, found in surveys.items() if not (isinstance(found, Unreadable) and found.unreachable)}


def _files(folder: Folder) -> list[str]:
    """Files of surveys in the order in which they were written."""
    return sorted(name for name in folder.sizes("survey/") if name.endswith(".json"))


def _read(folder: Folder, files: list[str], wanted: dict[str, Source]) -> dict[str, Survey]:
    """Surveys of the wanted sources by key; of two of a source, the later one."""
    found: dict[str, Survey] = {}
    with ThreadPoolExecutor(READERS) as pool:
        # not all of them at once: reading is faster than parsing
        for first in range(0, len(files), 4 * READERS):
            for content in pool.map(folder.read, files[first : first + 4 * READERS]):
                for document in json.loads(content)["surveys"]:
                    key = document.pop("of", None)  # older files have none
                    if key in wanted:
                        found[key] = from_document(document, wanted[key])
    return found


def _number(file: str) -> int:
    return int(file.removesuffix(".json").rpartition("-")[2])


def _survey(sources: list[Source], config: DatagenConfig, storage: StorageConfig) -> Generator[Survey]:
    """The Ray job: a survey of each source, in order."""

    def work(table: pa.Table) -> pa.Table:
        surveys = [_of(Source(row["id"], row["path"]), config, storage) for row in table.to_pylist()]
        return pa.table({"survey": text_array([json.dumps(to_document(found)) for found in surveys])})

    rows = [{"id": source.id, "path": source.path} for source in sources]
    dataset = dataset_of(rows).map_batches(
        work, batch_size=1, batch_format="pyarrow", num_cpus=1, max_retries=MAX_RETRIES
    )
    with closing(iterate_rows(dataset)) as surveyed:
        for source, row in zip(sources, surveyed, strict=True):
            yield from_document(json.loads(row["survey"]), source)


def _of(source: Source, config: DatagenConfig, storage: StorageConfig) -> Survey:
    try:
        return survey_isolated(source, config, storage)
    except UserError as error:
        return Unreadable(source, str(error), unreachable=isinstance(error, StorageError))
    except Exception as error:
        return Unreadable(source, f"{source.id}: {type(error).__name__}: {error}")

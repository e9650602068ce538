"""Which clips of which method are compared on which set; what is missing is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from pydantic import ValidationError

from common.config import Section
from common.errors import StorageError, UserError
from metrics.clips import find_clips

#: address of a folder or file -> where it lies on this machine
Place = Callable[[str], Path]
#: clips of the sets that the paper compares on; VideoLQ and AIGC60 have no HR clips
EXPECTED_CLIPS = {"SPMCS": 30, "UDM10": 10, "YouHQ40": 40, "VideoLQ": 50, "AIGC60": 60}
#: how the HR clips of a set are called beside the methods
HR = "HR"
#: names in a message
_NAMED = 10


class MethodFacts(Section):
    """FOLDER.method.yaml (or .json) beside a method's folder."""

    #: for the clip that the paper times: 21 frames of 1080p output
    seconds: float | None = None
    #: parameters in billions
    parameters_b: float | None = None


@dataclass(frozen=True)
class ComparedMethod:
    """A method: its name, the folder of its clips, where they come from, and what is told about it."""

    name: str
    folder: Path
    address: str
    facts: MethodFacts


@dataclass(frozen=True)
class ComparedSet:
    """The clips of one set that are compared.

    Attributes:
        clips: names in natural order, those that all have.
        references: HR clip by name; None for a set without them.
        videos: by method, then by name.
        missing: names of the clips that a method, or `HR`, lacks.
        expected: how many the set has as published; None for a set of one's own.
    """

    name: str
    clips: tuple[str, ...]
    references: dict[str, Path] | None
    videos: dict[str, dict[str, Path]]
    missing: dict[str, tuple[str, ...]] = field(default_factory=dict)
    expected: int | None = None

    @property
    def remarks(self) -> list[str]:
        """What a reader of the table must know about the set."""
        found = []
        whole = len(set(self.clips).union(*self.missing.values()))
        if self.expected not in (None, whole):
            found.append(f"{self.name} has {whole} clips here, {self.expected} as published.")
        if self.missing:
            lacking = "; ".join(f"{who} lacks {', '.join(names)}" for who, names in self.missing.items())
            found.append(f"{self.name}: only the {len(self.clips)} clips that all have are compared; {lacking}.")
        return found


def parse_methods(values: list[str], place: Place = Path) -> list[ComparedMethod]:
    """`NAME=FOLDER` of each.

    Args:
        place: gives the local folder of an address.

    Raises:
        UserError: another form, a name twice, no such folder, or facts that cannot be read.
    """
    methods: dict[str, ComparedMethod] = {}
    for value in values:
        name, _, address = value.partition("=")
        if not name or not address or name in methods or name == HR:
            raise UserError(f"--method {value}: give NAME=FOLDER, every name once, none called {HR}")
        folder = place(address)
        if not folder.is_dir():
            raise UserError(f"--method {value}: no folder {address}")
        methods[name] = ComparedMethod(name, folder, address, _facts(address, place))
    return list(methods.values())


def gather_sets(
    values: list[str], methods: list[ComparedMethod], place: Place = Path, *, allow_missing: bool
) -> list[ComparedSet]:
    """The clips of every set (`NAME=HR_FOLDER`, or `NAME` for one without HR clips) by every method.

    A method's clips lie in FOLDER/NAME, or in FOLDER itself where there is one set.

    Raises:
        UserError: another form, no clips, or a method that lacks some (unless `allow_missing`); all are named.
    """
    parsed: dict[str, Path | None] = {}
    for value in values:
        name, equals, folder = value.partition("=")
        if not name or name in parsed or bool(equals) != bool(folder):
            raise UserError(f"--set {value}: give NAME=HR_FOLDER, or NAME where there are no HR clips; every name once")
        parsed[name] = place(folder) if folder else None
    sets = [_gather(name, reference, methods, alone=len(parsed) == 1) for name, reference in parsed.items()]
    faults = [
        f"{who} lacks {len(names)} of the clips of {clip_set.name} ({_some(names)})"
        for clip_set in sets
        for who, names in clip_set.missing.items()
    ]
    if faults and not allow_missing:
        raise UserError(f"{'; '.join(faults)}: make them, or compare the others with --allow-missing")
    for clip_set in sets:
        if not clip_set.clips:
            raise UserError(f"{clip_set.name}: no clip that all have ({'; '.join(faults)}); names must be the same")
    return sets


def _gather(name: str, place: Path | None, methods: list[ComparedMethod], *, alone: bool) -> ComparedSet:
    references = find_clips(place) if place else None
    videos = {method.name: find_clips(_set_folder(method, name, alone=alone)) for method in methods}
    everywhere = videos if references is None else {HR: references, **videos}
    known = dict.fromkeys(clip for clips in everywhere.values() for clip in clips)
    missing = {who: tuple(clip for clip in known if clip not in clips) for who, clips in everywhere.items()}
    common = tuple(clip for clip in known if all(clip in clips for clips in everywhere.values()))
    expected = {key.lower(): count for key, count in EXPECTED_CLIPS.items()}.get(name.lower())
    return ComparedSet(name, common, references, videos, {who: lack for who, lack in missing.items() if lack}, expected)


def _set_folder(method: ComparedMethod, name: str, *, alone: bool) -> Path:
    if (method.folder / name).is_dir() or not alone:
        return method.folder / name
    return method.folder


def _facts(address: str, place: Place) -> MethodFacts:
    for suffix in ("yaml", "yml", "json"):
        try:
            file = place(f"{address.rstrip('/')}.method.{suffix}")
        except StorageError:
            raise
        except UserError:  # an s3:// address without a file
            continue
        if file.is_file():
            try:
                return MethodFacts.model_validate(yaml.safe_load(file.read_text()))
            except (yaml.YAMLError, ValidationError, OSError):
                fields = ", ".join(MethodFacts.model_fields)
                raise UserError(f"{file} must be a mapping of numbers with no other keys than {fields}") from None
    return MethodFacts()


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more

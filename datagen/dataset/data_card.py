"""The data card of a dataset: `report.html`, one self-contained page with statistics and a contact sheet."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
import yaml

from common.storage import Folder
from datagen.dataset.dataset import ShardDataset
from datagen.dataset.shard_format import Manifest
from datagen.dataset.shard_statistics import most_common
from datagen.degradation.registry import describe

REPORT = "report.html"
#: samples on the contact sheet
PICTURES = 24
#: sides of a picture are at most this, px; HR and LR of smaller crops are enlarged towards it by a whole number
PICTURE_SIDE = 320


def write_report(
    folder: Folder,
    manifest: Manifest,
    quarantine: list[dict[str, Any]],
    frames_of: Callable[[list[dict[str, Any]]], list[np.ndarray | None]],
) -> None:
    """Write `report.html` into the dataset folder, atomically.

    Args:
        quarantine: lines of quarantine.jsonl.
        frames_of: a frame, uint8 (H, W, 3) RGB, for each of some lines, or None.
    """
    reasons = [(of, reason, count) for of, table in left_out(quarantine).items() for reason, count in table.items()]
    examples = {_reason(line): line for line in reversed(quarantine)}
    shown = [examples[of, reason] for of, reason, _ in reasons]
    pictures = [None if frame is None else _data_uri(_small(frame)) for frame in frames_of(shown)]
    histogram = manifest.extra["statistics"]["lr_psnr_db"]
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True
    ).get_template("data_card.html")
    html = page.render(
        name=Path(folder.url).name,
        manifest=manifest,
        bytes=sum(entry.bytes for entry in manifest.shards),
        held_out=sum(entry.samples for entry in manifest.shards_of("validation")),
        statistics=manifest.extra["statistics"],
        tallest=max(histogram["histogram"], default=1),
        left_out=[
            {"of": of, "reason": reason, "count": count, "example": line, "picture": picture}
            for (of, reason, count), line, picture in zip(reasons, shown, pictures, strict=True)
        ],
        pictures=contact_sheet(folder, manifest, PICTURES),
        config=yaml.safe_dump(manifest.extra["config"], sort_keys=False),
    )
    folder.write(REPORT, html.encode())


def contact_sheet(folder: Folder, manifest: Manifest, count: int) -> list[dict[str, Any]]:
    """Up to `count` samples spread evenly over the dataset: metadata and a data URI of LR (enlarged) | HR.

    `picture` is None where the dataset keeps no clips.
    """
    dataset = ShardDataset(folder, manifest.shards)
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int))
    sheet = []
    for index in chosen.tolist():
        sample = dataset[index]
        metadata = sample.metadata()
        picture = None
        if "hr.mkv" in sample.spans:
            picture = _data_uri(side_by_side(sample.frames("lr"), sample.frames("hr")))
        sheet.append({"metadata": metadata, "picture": picture, "draws": describe(metadata["draws"])})
    return sheet


def side_by_side(lr: np.ndarray, hr: np.ndarray) -> np.ndarray:
    """Middle frame, LR enlarged without smoothing | HR, uint8 (H, 2W, 3) RGB; small ones show their pixels."""
    right = _small(hr[len(hr) // 2])
    times = max(1, PICTURE_SIDE // max(right.shape[:2]))
    size = (right.shape[1] * times, right.shape[0] * times)
    return np.hstack([cv2.resize(side, size, interpolation=cv2.INTER_NEAREST) for side in (lr[len(hr) // 2], right)])


def _small(picture: np.ndarray) -> np.ndarray:
    scale = min(1.0, PICTURE_SIDE / max(picture.shape[:2]))
    size = (round(picture.shape[1] * scale), round(picture.shape[0] * scale))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


#: what can be left out, from the whole to its parts
LEFT_OUT = ("sources", "windows", "samples")
#: what reasons of `filtered` lines begin with (datagen/plan.py, datagen/encode/clip.py), and how they are counted
FILTERS = {
    "black crop": "black crop",
    "empty crop": "empty crop",
    "black": "black",
    "empty": "empty",
    "static": "static",
    "blurred": "blurred",
    "repeated": "repeated",
    "duplicate of": "duplicate",
    "copy of held-out": "copy of a held-out source",
    "resolution": "too small",
    "length": "too short",
    "no scene": "scenes too short",
    "hdr": "HDR",
    "interlaced": "interlaced",
    "letterboxed": "letterboxed",
}


def left_out(quarantine: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """How many sources, windows and samples are left out for each reason, the most frequent first."""
    counts = Counter(map(_reason, quarantine))
    tables = {of: Counter({name: n for (what, name), n in counts.items() if what == of}) for of in LEFT_OUT}
    return {of: most_common(table) for of, table in tables.items() if table}


def _reason(line: dict[str, Any]) -> tuple[str, str]:
    """What a line leaves out, and why without particulars: `black: luma 3.1 is below 8.0` is `black`."""
    of = "samples" if "key" in line else "windows" if "start" in line else "sources"
    if line["kind"] == "filtered":
        return of, next((name for begin, name in FILTERS.items() if line["reason"].startswith(begin)), "filtered")
    return of, str(line["kind"])


def _data_uri(picture: np.ndarray) -> str:
    _, data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()

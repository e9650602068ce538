"""The data card of a dataset: `report.html`, one self-contained page with statistics and a contact sheet."""

from __future__ import annotations

import base64
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
import yaml

from common.storage import Folder
from datagen.dataset.dataset import ShardDataset
from datagen.dataset.shard_format import Manifest
from datagen.degradation.registry import describe

REPORT = "report.html"
#: samples on the contact sheet
PICTURES = 24
#: sides of a picture on the sheet are at most this, px
PICTURE_SIDE = 320


def write_report(folder: Folder, manifest: Manifest, quarantine: list[dict[str, Any]]) -> None:
    """Write `report.html` into the dataset folder, atomically."""
    reasons = Counter((line["kind"], _kind_of(line["reason"])) for line in quarantine)
    histogram = manifest.extra["statistics"]["lr_psnr_db"]
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True
    ).get_template("data_card.html")
    html = page.render(
        name=Path(folder.url).name,
        manifest=manifest,
        bytes=sum(entry.bytes for entry in manifest.shards),
        statistics=manifest.extra["statistics"],
        tallest=max(histogram["histogram"], default=1),
        reasons=[(kind, reason, count) for (kind, reason), count in reasons.most_common()],
        examples=quarantine[:12],
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
    """Middle frame, LR enlarged without smoothing | HR, uint8 (H, 2W, 3) RGB."""
    middle = len(hr) // 2
    scale = min(1.0, PICTURE_SIDE / max(hr.shape[1:3]))
    size = (round(hr.shape[2] * scale), round(hr.shape[1] * scale))
    small = cv2.resize(lr[middle], size, interpolation=cv2.INTER_NEAREST)
    return np.hstack([small, cv2.resize(hr[middle], size, interpolation=cv2.INTER_AREA)])


#: what reasons of windows begin with (datagen/plan.py)
FILTERS = ("black", "empty", "static", "blurred", "repeated")


def _kind_of(reason: str) -> str:
    """A reason without its particulars, for counting: `black: luma 3.1 is below 8.0` is `black`."""
    if reason.startswith(("duplicate of", "copy of held-out")):
        return "duplicate" if reason.startswith("duplicate") else "copy of a held-out source"
    if reason.startswith(("resolution", "length", "no scene")):
        return reason.split()[0] if not reason.startswith("no scene") else "scenes too short"
    return reason.split(":")[0] if reason.split(":")[0] in FILTERS else "unreadable"


def _data_uri(picture: np.ndarray) -> str:
    _, data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()

"""A page of preference pairs: input, preferred and less preferred with all scores, and the judges' agreement.

    python -m preference.gallery --pairs PAIRS --model MODEL --output gallery.html [--count 12]

Latents are decoded by the model's VAE; the middle frame is shown, and the place where both differ most, enlarged.
"""

from __future__ import annotations

import argparse
import base64
import io
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.atomic import write_atomic
from common.command_line import add_config_options, load_sections
from common.errors import UserError, run_command
from common.progress import progress
from common.storage import StorageConfig
from datagen.dataset.dataset import ShardDataset, StoredSample
from metrics.registry import find_metric
from pipeline.model.vae import VAE, decode_latents, load_vae
from preference.agreement import agreement

#: side of the enlarged place, as part of the shorter side of a frame; and the least, px [ours]
_PART, _LEAST = 8, 16
#: member -> its heading
_SHOWN = {"z_lr": "input, enlarged", "z_win": "preferred", "z_lose": "less preferred"}


def gallery(
    pairs: str, model: Path, output: Path, *, count: int = 12, storage: StorageConfig | None = None, device: str = "cpu"
) -> None:
    """Write the page, one HTML file.

    Args:
        count: pairs shown, spread evenly over the dataset; the agreement is that of all pairs.

    Raises:
        UserError: no finished pairs, or no VAE in the model folder.
    """
    dataset, manifest = ShardDataset.open(pairs, storage, kind="pairs")
    vae = load_vae(model / "vae").to(device)
    records = [dataset[position].metadata() for position in range(len(dataset))]
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)).tolist()
    cards = []
    with progress(len(chosen), "decoding pairs", "pairs") as bar:
        for position in chosen:
            cards.append(_card(dataset[position], records[position], vae))
            bar.advance(1)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("preference"), autoescape=True)
    page = environment.get_template("gallery.html").render(
        cards=cards,
        pairs=len(dataset),
        dropped=manifest.extra.get("dropped_by_kind", {}),
        agreement=agreement(records),
        arrows={name: "↓" if find_metric(name).lower_is_better else "↑" for name in records[0]["scores"]},
        name=Path(pairs).name,
    )
    write_atomic(output, page)


def _card(sample: StoredSample, record: dict[str, Any], vae: VAE) -> dict[str, Any]:
    latents = sample.tensors("pair")
    frames = {name: _middle_frame(vae, latents[name]) for name in _SHOWN}
    box = most_different(frames["z_win"], frames["z_lose"])
    images = [
        {"title": title, "frame": _uri(frames[name]), "detail": _uri(_part(frames[name], box))}
        for name, title in _SHOWN.items()
    ]
    return {"record": record, "images": images, "box": box}


def _middle_frame(vae: VAE, latent: Tensor) -> np.ndarray:
    """uint8 (H, W, 3)."""
    pixels = decode_latents(vae, latent[None])[0]
    frame = pixels[:, pixels.shape[1] // 2].permute(1, 2, 0)
    return ((frame + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def most_different(a: np.ndarray, b: np.ndarray) -> tuple[int, int, int]:
    """(left, top, side) of the square in which two frames (H, W, 3) differ most, in steps of half its side."""
    height, width = a.shape[:2]
    side = max(_LEAST, min(height, width) // _PART)
    difference = np.abs(a.astype(np.float64) - b).mean(axis=2)
    places = [(x, y) for y in range(0, height - side + 1, side // 2) for x in range(0, width - side + 1, side // 2)]
    left, top = max(places, key=lambda at: difference[at[1] : at[1] + side, at[0] : at[0] + side].sum())
    return left, top, side


def _part(frame: np.ndarray, box: tuple[int, int, int]) -> np.ndarray:
    left, top, side = box
    return frame[top : top + side, left : left + side]


def _uri(frame: np.ndarray) -> str:
    """Lossless: pairs differ by little."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description="Show preference pairs with their scores.")
    add_config_options(parser, required=False)
    parser.add_argument("--pairs", required=True, help="folder or s3:// prefix that preference.build wrote")
    parser.add_argument("--model", type=Path, required=True, help="the model folder that made them")
    parser.add_argument("--output", type=Path, required=True, help="an .html file")
    parser.add_argument("--count", type=int, default=12, help="pairs shown")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.count < 1:
        raise UserError(f"--count {arguments.count}: it must be at least 1")
    (storage,) = load_sections(arguments, storage=StorageConfig)
    gallery(
        arguments.pairs, arguments.model, arguments.output, count=arguments.count, storage=storage,
        device=arguments.device,
    )  # fmt: skip
    print(arguments.output)


if __name__ == "__main__":
    run_command(main)

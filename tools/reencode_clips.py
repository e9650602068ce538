"""The stored clips of a dataset with latents of another VAE, or turned: no source is read, nothing is degraded anew.

    python -m tools.reencode_clips --data DATASET --vae VAE --output DIR [--turn] [--seed 0]

For datasets with stored clips (`datagen.store_clips: true`). With `--turn` each clip, HR and LR alike, is flipped or
turned by one of the seven symmetries of the square that change it, drawn by its key and `--seed` (BasicSR's use_hflip
and use_rot); a clip that is not square by one of the three that keep its shape. Latents do not turn with pixels, so
turned clips are samples of their own: train on both folders' shards. Shards that are there already are kept: run the
same command again to resume.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from common.errors import UserError, run_command
from common.lossless_clip import encode_bytes
from common.progress import progress
from common.seeding import derive_seed
from datagen.dataset.dataset import ShardDataset, StoredSample
from datagen.dataset.shard_format import Sample, open_folder, read_committed, shard_name, write_manifest, write_shard
from datagen.encode.vae_encoder import Encoder, latents_member
from datagen.format_revision import vae_hash

#: symmetries of a rectangle beside the identity: (quarter turns, then flipped from left to right)
RECTANGLE = ((2, False), (0, True), (2, True))
#: and of a square
SQUARE = (*RECTANGLE, (1, False), (3, False), (1, True), (3, True))


def turned(clip: np.ndarray, symmetry: tuple[int, bool]) -> np.ndarray:
    """uint8 (F, H, W, 3) -> the same, or (F, W, H, 3) after an odd number of quarter turns."""
    quarters, flip = symmetry
    result = np.rot90(clip, quarters, axes=(1, 2))
    return np.ascontiguousarray(result[:, :, ::-1] if flip else result)


def draw(key: str, seed: int, square: bool) -> tuple[int, bool]:
    """The symmetry of the clip `key`."""
    choices = SQUARE if square else RECTANGLE
    return choices[derive_seed("turn", seed, key) % len(choices)]


class Reencoder:
    """Samples with new latents.

    Args:
        vae: its folder.
        seed: of the turns; None: clips stay as they are.
    """

    def __init__(self, vae: Path, seed: int | None) -> None:
        self._encoder, self._hash, self._seed = Encoder(str(vae), threads=1), vae_hash(vae), seed

    def __call__(self, stored: StoredSample) -> Sample:
        """
        Raises:
            UserError: it has no stored clips, or the VAE makes NaN of it.
        """
        if missing := {"hr.mkv", "lr.mkv"} - stored.spans.keys():
            raise UserError(f"{stored.shard}: sample {stored.key} has no {min(missing)}; build with store_clips: true")
        members = {name: stored.read(name) for name in stored.spans}
        metadata, key = stored.metadata(), stored.key
        hr, lr = stored.frames("hr"), stored.frames("lr")
        if self._seed is not None:
            quarters, flip = symmetry = draw(key, self._seed, hr.shape[1] == hr.shape[2])
            hr, lr = turned(hr, symmetry), turned(lr, symmetry)
            members |= {"hr.mkv": encode_bytes(hr), "lr.mkv": encode_bytes(lr)}
            metadata["turned"] = {"quarters": quarters, "flipped": flip}
            key = f"{key}-t{self._seed}"
        latents = latents_member(*(found[0] for found in self._encoder.latents([hr], [lr])))
        if latents is None:
            raise UserError(f"{stored.shard}: the VAE makes NaN or infinity of sample {stored.key}")
        metadata["versions"] = metadata.get("versions", {}) | {"vae": self._hash}
        members |= {"latents.safetensors": latents, "json": json.dumps(metadata, sort_keys=True).encode()}
        return Sample(key, members)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dataset folder with stored clips")
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--turn", action="store_true", help="flip or turn every clip")
    parser.add_argument("--seed", type=int, default=0, help="of the turns")
    arguments = parser.parse_args()
    dataset, manifest = ShardDataset.open(arguments.data, kind="clips")
    turns = arguments.seed if arguments.turn else None
    reencode = Reencoder(arguments.vae, turns)
    made = {"vae": vae_hash(arguments.vae), "turns": turns, "of": dataset.fingerprint}
    folder, committed, first = open_folder(arguments.output), [], 0
    with progress(len(dataset), "encoding", "clips") as bar:
        for index, entry in enumerate(dataset.shards):
            rows = range(first, first := first + entry.samples)
            try:
                found = read_committed(folder, shard_name(index))
            except FileNotFoundError:
                samples = []
                for row in rows:
                    samples.append(reencode(dataset[row]))
                    bar.advance()
                found = write_shard(folder, index, samples, made, entry.split)
            else:
                bar.advance(len(rows))
            if found.extra != made or found.samples != entry.samples:
                raise UserError(
                    f"{arguments.output}: {found.name} is of another dataset, VAE or seed; choose another --output"
                )
            committed.append(found)
    command = " ".join(["python -m tools.reencode_clips", *sys.argv[1:]])
    write_manifest(folder, "clips", committed, manifest.extra | {"reencoded": made | {"command": command}})
    print(f"{arguments.output}: {len(dataset)} samples")


if __name__ == "__main__":
    run_command(main)

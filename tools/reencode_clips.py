"""The stored clips of datasets with latents of another VAE, and turned: no source is read, nothing is degraded anew.

    python -m tools.reencode_clips --data DATASET … --vae VAE --output DIR [--turns 0] [--seed 0]

For datasets with stored clips (`datagen.store_clips: true`); several become one. With `--turns` N there are N further
samples of each clip: HR and LR, flipped or turned by N of the seven symmetries of the square that change it, drawn by
its key and `--seed` (BasicSR's use_hflip and use_rot); of a clip that is not square there are three. Latents do not
turn with pixels, so each is encoded. Shards that are there already are kept: run the same command again to resume.
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
from datagen.dataset.shard_format import (
    CommittedShard,
    Sample,
    open_folder,
    read_committed,
    shard_name,
    write_manifest,
    write_shard,
)
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


def draw(key: str, seed: int, turn: int, square: bool) -> tuple[int, bool]:
    """The symmetry of turn number 1, 2, … of the clip `key`; those of different numbers differ.

    Raises:
        UserError: there are not as many.
    """
    choices = SQUARE if square else RECTANGLE
    if turn > len(choices):
        raise UserError(
            f"--turns {turn}: a clip{'' if square else ' that is not square'} has {len(choices)}; take fewer"
        )
    return choices[(derive_seed("turn", seed, key) + turn - 1) % len(choices)]


class Reencoder:
    """Samples with new latents.

    Args:
        vae: its folder.
        seed: of the turns.
    """

    def __init__(self, vae: Path, seed: int) -> None:
        self._encoder, self._hash, self._seed = Encoder(str(vae), threads=1), vae_hash(vae), seed

    def __call__(self, stored: StoredSample, turn: int) -> Sample:
        """
        Args:
            turn: its number; 0: as it is.

        Raises:
            UserError: it has no stored clips, or the VAE makes NaN of it.
        """
        if missing := {"hr.mkv", "lr.mkv"} - stored.spans.keys():
            raise UserError(f"{stored.shard}: sample {stored.key} has no {min(missing)}; build with store_clips: true")
        members = {name: stored.read(name) for name in stored.spans}
        metadata, key = stored.metadata(), stored.key
        hr, lr = stored.frames("hr"), stored.frames("lr")
        if turn:
            quarters, flip = symmetry = draw(key, self._seed, turn, hr.shape[1] == hr.shape[2])
            hr, lr = turned(hr, symmetry), turned(lr, symmetry)
            members |= {"hr.mkv": encode_bytes(hr), "lr.mkv": encode_bytes(lr)}
            metadata["turned"] = {"quarters": quarters, "flipped": flip}
            key = f"{key}-t{turn}"
        latents = latents_member(*(found[0] for found in self._encoder.latents([hr], [lr])))
        if latents is None:
            raise UserError(f"{stored.shard}: the VAE makes NaN or infinity of sample {stored.key}")
        metadata["versions"] = metadata.get("versions", {}) | {"vae": self._hash}
        members |= {"latents.safetensors": latents, "json": json.dumps(metadata, sort_keys=True).encode()}
        return Sample(key, members)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="dataset folders with stored clips")
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=0, help="turned samples beside each clip, at most 7")
    parser.add_argument("--seed", type=int, default=0, help="of the turns")
    arguments = parser.parse_args()
    opened = [ShardDataset.open(address, kind="clips") for address in arguments.data]
    reencode = Reencoder(arguments.vae, arguments.seed)
    made = {"vae": vae_hash(arguments.vae), "seed": arguments.seed}
    folder = open_folder(arguments.output)
    committed: list[CommittedShard] = []
    with progress((1 + arguments.turns) * sum(len(dataset) for dataset, _ in opened), "encoding", "clips") as bar:
        for turn in range(1 + arguments.turns):
            for dataset, _ in opened:
                first = 0
                for entry in dataset.shards:
                    rows = range(first, first := first + entry.samples)
                    index, wanted = len(committed), made | {"turn": turn, "of": entry.sha256}
                    try:
                        found = read_committed(folder, shard_name(index))
                    except FileNotFoundError:
                        samples = []
                        for row in rows:
                            samples.append(reencode(dataset[row], turn))
                            bar.advance()
                        found = write_shard(folder, index, samples, wanted, entry.split)
                    else:
                        bar.advance(len(rows))
                    if found.extra != wanted:
                        what = f"{arguments.output}: {found.name} is of other datasets, another VAE or seed"
                        raise UserError(f"{what}; give another --output")
                    committed.append(found)
    said = made | {"turns": arguments.turns, "command": " ".join(["python -m tools.reencode_clips", *sys.argv[1:]])}
    _, manifest = opened[0]
    kept = {name: value for name, value in manifest.extra.items() if name != "statistics"}  # they are of other latents
    versions = kept.get("versions", {})
    encoding = f"{versions.get('encoding')}, turned" if arguments.turns else versions.get("encoding")
    versions = versions | {"vae": made["vae"], "encoding": encoding}  # a clip's own latents are not the only ones here
    write_manifest(folder, "clips", committed, kept | {"versions": versions, "reencoded": said})
    print(f"{arguments.output}: {sum(shard.samples for shard in committed)} samples")


if __name__ == "__main__":
    run_command(main)

"""The content of a small dataset is what golden.json says: order, frames, draws and latents.

A failure means that datasets begun with older code would mix two kinds of samples. If the change is intended, raise
the revision in datagen/format_revision.py that names it, then write the file anew:
`python -m tests.datagen.test_golden_bytes`.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from safetensors.torch import load

from common.storage import open_folder
from datagen.dataset.shard_format import read_manifest, read_member, read_sidecar
from tests.datagen.conftest import VARIANTS, run_build, write_config, write_videos

GOLDEN = Path(__file__).with_name("golden.json")


def summary(dataset: Path) -> dict[str, Any]:
    """Keys by shard; of each sample the hashes of its frames and metadata, and mean and deviation of its latents."""
    folder = open_folder(dataset)
    shards: dict[str, Any] = {}
    for entry in read_manifest(folder).shards:
        sidecar = read_sidecar(folder, entry.name)
        shards[entry.name] = {}
        for key, spans in zip(sidecar.keys, sidecar.members, strict=True):
            members = {name: read_member(folder, entry.name, span) for name, span in spans.items()}
            metadata = json.loads(members["json"])
            del metadata["versions"]  # of the libraries at hand, which are another matter
            latents = load(members["latents.safetensors"])
            shards[entry.name][key] = {
                "lr": _frames_hash(members["lr.mkv"]),
                "hr": _frames_hash(members["hr.mkv"]),
                "metadata": hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:16],
                "latents": [
                    round(float(value), 4)
                    for name in ("z_hr", "z_lr")
                    for value in (latents[name].float().mean(), latents[name].float().std())
                ],
            }
    return shards


def _frames_hash(content: bytes) -> str:
    with av.open(io.BytesIO(content)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return hashlib.sha256(np.stack(frames).tobytes()).hexdigest()[:16]


@pytest.mark.distributed
def test_a_dataset_has_the_committed_content(whole: Path) -> None:
    golden, now = json.loads(GOLDEN.read_text()), summary(whole)
    assert now.keys() == golden.keys()
    for shard, samples in golden.items():
        assert list(now[shard]) == list(samples), f"{shard} holds other samples, or in another order"
        for key, sample in samples.items():
            # convolutions may round differently on another processor; bf16 holds three digits
            np.testing.assert_allclose(now[shard][key].pop("latents"), sample.pop("latents"), atol=2e-3)
            assert now[shard][key] == sample, f"{key} in {shard}"


def test_the_summary_sees_a_changed_frame(tmp_path: Path) -> None:
    from common.lossless_clip import encode_bytes

    frames = np.zeros((5, 32, 32, 3), np.uint8)
    before = _frames_hash(encode_bytes(frames))
    frames[4, 31, 31, 2] = 1
    assert _frames_hash(encode_bytes(frames)) != before


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_build(write_config(folder), write_videos(folder / "videos"), folder / "dataset", *VARIANTS)
        GOLDEN.write_text(json.dumps(summary(folder / "dataset"), indent=1) + "\n")


if __name__ == "__main__":
    main()

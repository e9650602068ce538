"""Statistics of a dataset, gathered shard by shard while it is written, summed for the manifest and the data card."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
from safetensors import deserialize

from datagen.dataset.shard_format import Sample

#: how many of the sources with the most samples are named
LARGEST_SOURCES = 10


class ShardStatistics:
    """Counts and moments of one shard's samples; `record` is what the sidecar keeps of them."""

    def __init__(self) -> None:
        self.record: dict[str, Any] = {"counts": {}, "lr_psnr_db": [], "latents": {}}

    def add(self, sample: Sample) -> None:
        metadata = json.loads(sample.members["json"])
        counts = self.record["counts"]
        _count(counts, "recipe", metadata["recipe"])
        _count(counts, "source", metadata["source"])
        for operation in metadata["draws"]:
            kind = operation.get("kind") or operation.get("codec") or operation.get("interpolation")
            if kind:
                _count(counts, operation["op"], kind)
        self.record["lr_psnr_db"].append(metadata["lr_psnr_db"])
        for name, stored in deserialize(sample.members["latents.safetensors"]):
            values = _float32(stored)
            moments = self.record["latents"].setdefault(name, {"values": 0, "sum": None, "squares": None})
            moments["values"] += values.shape[1]
            moments["sum"] = _added(moments["sum"], values.sum(1, dtype=np.float64).tolist())
            # the square of a bf16 number is exact in float32
            moments["squares"] = _added(moments["squares"], np.square(values).sum(1, dtype=np.float64).tolist())


def summed(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Statistics of the dataset from those of its shards: counts, largest sources, quantiles of PSNR, latents' moments.

    Latent statistics are per channel; a mean far from 0 or a deviation far from 1 says that the VAE's normalisation
    does not fit the data.
    """
    counts: dict[str, Counter[str]] = {}
    for record in records:
        for group, table in record["counts"].items():
            counts.setdefault(group, Counter()).update(table)
    psnr = [value for record in records for value in record["lr_psnr_db"]]
    quantiles = np.quantile(psnr, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]).round(2).tolist() if psnr else []
    histogram, edges = np.histogram(psnr, bins=20) if psnr else (np.zeros(0, int), np.zeros(0))
    latents = {}
    for name in sorted({name for record in records for name in record["latents"]}):
        parts = [record["latents"][name] for record in records if name in record["latents"]]
        values = sum(part["values"] for part in parts)
        mean = np.sum([part["sum"] for part in parts], 0) / values
        spread = np.sqrt(np.maximum(np.sum([part["squares"] for part in parts], 0) / values - mean**2, 0))
        latents[name] = {"mean": mean.round(4).tolist(), "std": spread.round(4).tolist()}
    return {
        "counts": {group: most_common(table) for group, table in sorted(counts.items()) if group != "source"},
        "sources": len(counts.get("source", ())),
        "largest_sources": dict(list(most_common(counts.get("source", Counter())).items())[:LARGEST_SOURCES]),
        "lr_psnr_db": {"quantiles": quantiles, "histogram": histogram.tolist(), "edges": edges.round(2).tolist()},
        "latents": latents,
    }


def _float32(stored: dict[str, Any]) -> np.ndarray:
    """A stored latent as (C, T·h·w) float32, without torch."""
    channels, data = stored["shape"][0], stored["data"]
    if stored["dtype"] == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(channels, -1)
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[stored["dtype"]]).astype(np.float32).reshape(channels, -1)


def _count(counts: dict[str, dict[str, int]], group: str, name: str) -> None:
    table = counts.setdefault(group, {})
    table[name] = table.get(name, 0) + 1


def _added(total: list[float] | None, values: list[float]) -> list[float]:
    return values if total is None else [a + b for a, b in zip(total, values, strict=True)]


def most_common(counts: Counter[str]) -> dict[str, int]:
    """The most frequent first, equal ones by name: the order in which a job counted does not show."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

"""How fast a run is: samples/s, tokens/s, FLOP/s per device and the share of what the device could do (MFU)."""

from __future__ import annotations

import re

import torch

from datagen.dataset.loader import Batch
from trainer.planning.flops import flops_per_sample
from trainer.stages.stage import TrainingStage

#: dense bf16 FLOP/s by the makers' data sheets, which often print twice as much ("with sparsity");
#: the keys are found in torch.cuda.get_device_name()
PEAK_FLOPS: dict[str, float] = {
    r"\bB200\b": 2250e12,  # NVIDIA HGX B200 data sheet: 36 PFLOP/s with sparsity, eight GPUs
    r"\bH200$": 989e12,  # NVIDIA H200 data sheet, SXM: 1979 with sparsity
    r"\bH200 NVL\b": 835e12,  # NVIDIA H200 data sheet, NVL: 1671 with sparsity
    r"\bH100 PCIe\b": 756e12,  # NVIDIA H100 data sheet, PCIe: 1513 with sparsity
    r"\bH100 NVL\b": 835e12,  # NVIDIA H100 data sheet, NVL: 1671 with sparsity
    r"\bH100 (80GB HBM3|SXM)": 989e12,  # NVIDIA H100 data sheet, SXM: 1979 with sparsity
    r"\bA100\b": 312e12,  # NVIDIA A100 data sheet, PCIe and SXM
    r"\bA40\b": 149.7e12,  # NVIDIA A40 data sheet
    r"\bA10\b": 125e12,  # NVIDIA A10 data sheet
    r"\bL40S\b": 362e12,  # NVIDIA L40S data sheet: 733 with sparsity
    r"\bL40\b": 181e12,  # NVIDIA L40 data sheet: 362 with sparsity
    r"\bL4\b": 121e12,  # NVIDIA L4 data sheet: 242 with sparsity
    r"\bRTX 5090$": 209.5e12,  # NVIDIA RTX Blackwell architecture paper, float32 accumulation
    r"\bRTX 4090$": 165e12,  # NVIDIA Ada architecture paper, float32 accumulation
    r"\bRTX 3090$": 71e12,  # NVIDIA Ampere GA102 architecture paper, float32 accumulation
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of one device of that name, None if the table doesn't know it."""
    if "MIG" in device_name:
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(name, device_name)), None)


class Throughput:
    """Turns seconds into rates; operations (trainer/planning/flops.py) are counted once per objective of a stage."""

    def __init__(
        self, stage: TrainingStage, *, global_batch_size: int, devices: int, peak: float | None = None
    ) -> None:
        """
        Args:
            global_batch_size: samples of the exported network's update, over all devices.
            peak: FLOP/s of one device; None: the data sheet's where it is known, else there is no MFU.
        """
        self._stage, self._samples, self._devices = stage, global_batch_size, devices
        if peak is None and torch.cuda.is_available():
            peak = peak_flops(torch.cuda.get_device_name())
        self._peak = peak
        self._flops: dict[tuple[str, tuple[torch.Size, ...]], float] = {}

    def rates(self, step: int, batch: Batch, seconds: float) -> dict[str, float]:
        """Of a step that took `seconds`, on batches of the shape of `batch`."""
        shapes = tuple(tensor.shape[1:] for tensor in batch.tensors.values())
        kind = (self._stage.objective(step), shapes)
        if kind not in self._flops:
            self._flops[kind] = flops_per_sample(self._stage, step, batch)
        achieved = self._flops[kind] * self._samples / self._devices / seconds
        rates = {
            "samples_per_second": self._samples / seconds,
            "tokens_per_second": self._samples * self._stage.tokens_per_sample(batch) / seconds,
            "tflops_per_device": achieved / 1e12,
        }
        if self._peak is not None:
            rates["mfu"] = achieved / self._peak
        return rates

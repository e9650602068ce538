"""The part `checks`: does the device compute what the CPU computes in float32?

As a module of its own it prints the CPU's rounds of Stage II: `python -m benchmarks.gpu.checks full`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.gpu import stage_two
from benchmarks.gpu.attention_check import attention_error
from benchmarks.gpu.resume_check import resume_deviation
from benchmarks.gpu.sizes import SIZES, Size
from benchmarks.gpu.stage_two import Logs
from benchmarks.gpu.table import Table
from benchmarks.gpu.vae_checks import vae_precision, vae_tiles
from pipeline.model.attention import BACKENDS
from trainer.config import TrainerConfig
from trainer.engine.process_group import World, start_distributed

ROOT = Path(__file__).resolve().parents[2]
LINEAR = torch.nn.functional.linear
Precision = Literal["fp32", "bf16"]

#: device against the CPU's float32: orders of summation; in bfloat16 what tests/trainer/test_parity.py allows
AGAINST_CPU: dict[Precision, float] = {"fp32": 1e-3, "bf16": 0.2}
#: two ways to run the same rounds on one device: attention's backward may add in any order, ZeRO rounds gradients anew
SAME_DEVICE: dict[Precision, float] = {"fp32": 1e-4, "bf16": 0.1}
#: engines that have to train as ZeRO-1 does. Those at ZeRO-3 come last: the first one replaces torch's linear
ENGINES: dict[str, dict[str, Any]] = {
    "ZeRO-2": {"zero_stage": 2},
    "activation checkpointing": {"activation_checkpointing": True},
    "ZeRO-2, offloaded optimizer": {"zero_stage": 2, "offload_optimizer": True},
    "ZeRO-3": {"zero_stage": 3},
    "ZeRO-3, offloaded optimizer and parameters": {
        "zero_stage": 3,
        "offload_optimizer": True,
        "offload_parameters": True,
    },
}


def run(table: Table, name: str, world: World) -> None:
    """All rows, at the size called `name`."""
    size = SIZES[name]
    torch.backends.cudnn.allow_tf32 = False  # "float32" shall mean it

    @cache
    def rounds(precision: Precision) -> Logs:
        return _rounds(size, world, precision)

    def against(reference: Logs, logs: Logs, limit: float) -> dict[str, float]:
        return {"deviation": stage_two.deviation(logs, reference), "limit": limit}

    command = [sys.executable, "-m", "benchmarks.gpu.checks", name]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=hidden, stdout=subprocess.PIPE, text=True) as process:  # beside the next rows
        table.attempt("Wan VAE, fp32, against float64", partial(vae_precision, size, world))
        table.attempt("Wan VAE, tiles against the whole clip", partial(vae_tiles, size, world))
        for backend in BACKENDS:
            table.attempt(f"attention {backend}, bf16", partial(attention_error, backend, torch.bfloat16, size, world))
        table.attempt("attention native, fp32", partial(attention_error, "native", torch.float32, size, world))
        output, _ = process.communicate()
    for precision, limit in AGAINST_CPU.items():
        row = f"Stage II, {precision}, against the CPU"
        table.attempt(row, lambda p=precision, n=limit: against(_last_line(output), rounds(p), n))
    for precision in size.compiled:
        row = f"Stage II, {precision}, compiled blocks"
        compiled = partial(_rounds, size, world, precision, compile_blocks=True)
        limit = AGAINST_CPU[precision]  # inductor rounds a fused block elsewhere than eager mode does
        table.attempt(row, lambda p=precision, n=limit, run=compiled: against(rounds(p), run(), n))
    table.attempt("resume against an uninterrupted run", partial(resume_deviation, world))
    for engine, settings in ENGINES.items():
        for precision, limit in SAME_DEVICE.items():
            row = f"Stage II, {precision}, {engine}"
            other = partial(_rounds, size, world, precision, **settings)
            table.attempt(row, lambda p=precision, n=limit, run=other: against(rounds(p), run(), n))


def _rounds(size: Size, world: World, precision: Precision, *, compile_blocks: bool = False, **engine: Any) -> Logs:
    """Two rounds, at ZeRO-1 unless `engine` says otherwise."""
    config = TrainerConfig.model_validate(
        {
            "engine": {"zero_stage": 1, "precision": precision, "persistence_threshold": 0} | engine,
            "attention": "native",
            "compile_blocks": compile_blocks,
            # rates at which the second round's losses tell whether the first one's updates were right
            "dual_stream": {
                "student": {"learning_rate": 1e-4},
                "fake_score": {"learning_rate": 1e-4},
                "heads_learning_rate": 1e-3,
                "head": {"hidden_channels": 16},
                "gradient_norms_every": 2,  # in the second round: further passes through graphs that may be compiled
            },
        }
    )
    try:
        stage = stage_two.build(size.checked, config, world)
        return stage_two.run_rounds(stage, size.checked, size.latent)
    finally:
        torch.nn.functional.linear = LINEAR


def _last_line(output: str) -> Logs:
    if not output.strip():
        raise RuntimeError("the CPU's rounds failed, see stderr")
    logs: Logs = json.loads(output.splitlines()[-1])
    return logs


if __name__ == "__main__":
    print(json.dumps(_rounds(SIZES[sys.argv[1]], start_distributed(), "fp32")))

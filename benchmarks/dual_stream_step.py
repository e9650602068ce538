"""What one round of Stage II costs, beside a literal reading of Algorithm 1 that runs every term on its own.

    python benchmarks/dual_stream_step.py                                   # any machine
    python benchmarks/dual_stream_step.py --shape wan-1.3b --checkpointing  # a GPU

Prints, and with --output appends to a file:
  - floating-point operations of one round, counted on the meta device at the full 1.3 B shape;
  - seconds and peak memory of one round of both, in one run, at --shape;
  - on a GPU also MFU and tokens/s, per attention backend, and with --profile where the time goes.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, from anywhere

from benchmarks.literal_dual_stream import LiteralDualStream
from common.live_bytes import LiveBytes
from datagen.dataset.loader import Batch
from pipeline.model.transformer import VSRTransformer, tapped_layers
from trainer.engine.config import DeepSpeedConfig
from trainer.engine.process_group import start_distributed
from trainer.monitoring.throughput import peak_flops
from trainer.planning.flops import BareNetwork, UntrackedModules
from trainer.stages.dual_stream.algorithm import DualStream
from trainer.stages.dual_stream.auxiliary_networks import Critic
from trainer.stages.dual_stream.config import DualStreamConfig, HeadConfig
from trainer.stages.dual_stream.spec import SPEC
from trainer.stages.stage import Meter, StageSetup

SHAPES: dict[str, dict[str, Any]] = {
    "wan-1.3b": {},  # VSRTransformer's defaults
    "tiny": {
        "latent_channels": 16,
        "num_attention_heads": 4,
        "attention_head_dim": 64,
        "text_dim": 64,
        "freq_dim": 64,
        "ffn_dim": 1024,
        "num_layers": 10,
    },
}
PROMPT_TOKENS = {"wan-1.3b": 512, "tiny": 4}


def build_modules(shape: str, device: str, dtype: torch.dtype, config: DualStreamConfig) -> dict[str, nn.Module]:
    """Student, critic and real score with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        student, fake, real = (VSRTransformer(**SHAPES[shape]) for _ in range(3))
        taps = tapped_layers(len(fake.blocks), config.tap_fractions)
        critic = Critic(fake, taps=taps, tapped=config.tapped, head=HeadConfig())
    modules: dict[str, nn.Module] = {"student": student, "critic": critic, "real_score": real}
    for module in modules.values():
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)
    return modules


def build_stage(modules: dict[str, nn.Module], shape: str, device: str, config: DualStreamConfig) -> DualStream:
    """The trainer's own stage over bare modules."""
    return DualStream(_BareSetup(**_setup(modules, shape, device, config)))


class _BareSetup(StageSetup):
    """Networks without engines, with optimizers of their own."""

    def network(self, name: str, parameter_groups: Any = None) -> Any:
        trained = self.spec.network(name).optimizer is not None and self.device != "meta"
        adam = torch.optim.AdamW(self.modules[name].parameters(), 1e-6) if trained else None
        return BareNetwork(self.modules[name], optimizer=adam)


def _setup(
    modules: dict[str, nn.Module],
    shape: str,
    device: str,
    config: DualStreamConfig,
    engine: DeepSpeedConfig | None = None,
) -> dict[str, Any]:
    """Arguments of `StageSetup`."""
    return {
        "spec": SPEC,
        "config": config,
        "modules": modules,
        "engine_of": lambda name: engine,
        "embed": _embedder(shape, device),
        "seed": 0,
        "device": device,
    }


def _embedder(shape: str, device: str) -> Callable[[list[str]], Tensor]:
    width = SHAPES[shape].get("text_dim", 4096)
    return lambda captions: torch.zeros(len(captions), PROMPT_TOKENS[shape], width, device=device)


def make_batch(shape: str, device: str, arguments: argparse.Namespace) -> Batch:
    channels = SHAPES[shape].get("latent_channels", 16)
    height, width = (-(-size // 16) * 2 for size in (arguments.height, arguments.width))
    latent = (arguments.batch, channels, (arguments.frames - 1) // 4 + 1, height, width)
    keys = [str(index) for index in range(arguments.batch)]
    tensors = {name: torch.randn(latent).to(device) for name in ("z_hr", "z_lr")}
    return Batch(keys, tensors, [{"caption": ""} for _ in keys])


def round_of_ours(stage: DualStream, batch: Batch) -> None:
    meter = Meter(stage._device)
    for update in range(stage.config.auxiliary_updates):
        stage.auxiliary_update(0, update, [batch], meter)
    stage.student_update(0, [batch], meter)


READINGS = ("ours", "literal", "as_printed")


def count_flops(arguments: argparse.Namespace, readings: Sequence[str] = READINGS) -> dict[str, float]:
    """Of one round at the full shape; nothing is computed on the meta device, so this is exact and quick."""
    config = DualStreamConfig()
    batch = make_batch("wan-1.3b", "meta", arguments)
    modules = build_modules("wan-1.3b", "meta", torch.bfloat16, config)
    stage = build_stage(modules, "wan-1.3b", "meta", config)
    literal = LiteralDualStream(config, modules, _embedder("wan-1.3b", "meta"), "meta")
    rounds = {
        "ours": lambda: round_of_ours(stage, batch),
        "literal": lambda: literal.round(batch, each_term_alone=True),
        "as_printed": lambda: literal.round(batch, each_term_alone=False),
    }
    counts = {}
    for name in readings:
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = UntrackedModules()
        with counter:
            rounds[name]()
        counts[name] = float(counter.get_total_flops())
    return counts


def measure(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each after a warm-up round, taken in turns, and the peak memory of a round.

    On a CPU also the median of the processor's own seconds, which a busy machine doesn't stretch.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 1):
        for name, run in runs.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if index:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
                cpu_seconds[name].append(time.process_time() - cpu_start)
    results = {
        name: {"seconds_per_round": statistics.median(seconds[name]), "peak_memory_gib": peak_memory_bytes(run) / 2**30}
        for name, run in runs.items()
    }
    if not torch.cuda.is_available():
        for name, result in results.items():
            result["cpu_seconds_per_round"] = statistics.median(cpu_seconds[name])
    return results


def peak_memory_bytes(run: Callable[[], None]) -> int:
    """Of tensors, in one more round. GPU: all; CPU: those made in the round, without what was there before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    with LiveBytes() as live:
        run()
    return live.peak


def time_bare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both readings on bare modules, with optimizers of their own."""
    config, device, engine = _setting(arguments)
    batch = make_batch(arguments.shape, device, arguments)
    embed = _embedder(arguments.shape, device)
    modules = build_modules(arguments.shape, device, engine.dtype, config)
    if arguments.checkpointing:
        for module in modules.values():
            getattr(module, "transformer", module).enable_gradient_checkpointing()
    literal = LiteralDualStream(config, modules, embed, device)
    stage = build_stage(modules, arguments.shape, device, config)
    return measure(
        {"literal": lambda: literal.round(batch, each_term_alone=True), "ours": lambda: round_of_ours(stage, batch)},
        arguments.rounds,
    )


def time_engines(arguments: argparse.Namespace, flops: dict[str, float]) -> dict[str, Any]:
    """Ours in DeepSpeed engines, with each attention backend."""
    config, device, engine = _setting(arguments)
    batch = make_batch(arguments.shape, device, arguments)
    results: dict[str, Any] = {}
    modules = build_modules(arguments.shape, device, torch.float32, config)
    engined = DualStream(StageSetup(**_setup(modules, arguments.shape, device, config, engine)))
    for backend in arguments.attention:
        for network in engined.networks.values():
            model = getattr(network.module, "transformer", network.module)
            model.set_attention_backend(backend)
        name = f"ours_deepspeed_{backend}"
        results |= measure({name: lambda: round_of_ours(engined, batch)}, arguments.rounds)
        _add_rates(results[name], batch, config, flops["ours"], arguments)
    if arguments.profile:
        _print_profile(lambda: round_of_ours(engined, batch))
    return results


def _setting(arguments: argparse.Namespace) -> tuple[DualStreamConfig, str, DeepSpeedConfig]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = DeepSpeedConfig(
        zero_stage=arguments.zero_stage,
        precision="bf16" if device == "cuda" else "fp32",
        activation_checkpointing=arguments.checkpointing,
    )
    return DualStreamConfig(), device, engine


def _add_rates(
    result: dict[str, Any], batch: Batch, config: DualStreamConfig, flops: float, arguments: argparse.Namespace
) -> None:
    """Tokens/s: tokens of the clips a round consumes. MFU: counted operations, recomputation left out."""
    b, _, t, h, w = batch.tensors["z_hr"].shape
    tokens = (config.auxiliary_updates + 1) * b * t * (h // 2) * (w // 2)
    result["tokens_per_second"] = tokens / result["seconds_per_round"]
    if torch.cuda.is_available() and arguments.shape == "wan-1.3b":
        peak = peak_flops(torch.cuda.get_device_name())
        if peak is not None:
            result["mfu"] = flops / result["seconds_per_round"] / peak


def _print_profile(run: Callable[[], None]) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        run()
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=60))


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return f"{line.split(': ')[1]}, {torch.get_num_threads()} threads"
    return "CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="of the timed rounds")
    parser.add_argument("--frames", type=int, default=21)
    parser.add_argument("--height", type=int, default=720)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--timed-size", type=int, nargs=3, metavar=("FRAMES", "HEIGHT", "WIDTH"), default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--zero-stage", type=int, choices=(1, 2, 3), default=1)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--attention", nargs="+", default=["native"], help="diffusers' attention backends")
    parser.add_argument("--skip-bare", action="store_true", help="time the DeepSpeed engines only")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--output", type=Path, help="append the report to this file")
    arguments = parser.parse_args()

    start_distributed()
    flops = count_flops(arguments)
    size = f"{arguments.frames} frames {arguments.width}x{arguments.height}, batch {arguments.batch}"
    lines = [
        f"# {datetime.date.today()}  {_device_name()}  torch {torch.__version__}",
        f"# command: python benchmarks/dual_stream_step.py {' '.join(sys.argv[1:])}".rstrip(),
        f"operations of one round, 1.3 B shape, {size}:",
        *(f"  {name:12s} {count / 1e15:8.3f} PFLOP" for name, count in flops.items()),
    ]
    if arguments.timed_size:
        arguments.frames, arguments.height, arguments.width = arguments.timed_size
    results = ({} if arguments.skip_bare else time_bare(arguments)) | time_engines(arguments, flops)
    size = f"{arguments.frames} frames {arguments.width}x{arguments.height}, batch {arguments.batch}"
    lines.append(f"one round, shape {arguments.shape}, {size}:")
    for name, result in results.items():
        lines.append(f"  {name:24s} " + "  ".join(f"{key} {value:.4g}" for key, value in result.items()))
    summary: dict[str, Any] = {
        "flops_ratio": flops["ours"] / flops["literal"],
        "flops_ratio_as_printed": flops["ours"] / flops["as_printed"],
        "flops": flops,
        "rounds": results,
        "device": _device_name(),
    }
    if not arguments.skip_bare:
        for key in results["ours"]:
            summary[key.replace("per_round", "ratio").replace("gib", "ratio")] = (
                results["ours"][key] / results["literal"][key]
            )
    report = "\n".join([*lines, json.dumps(summary)])
    print(report)
    if arguments.output:
        with arguments.output.open("a") as file:
            file.write(report + "\n\n")


if __name__ == "__main__":
    main()

"""Hours, memory and storage of all stages, from the base to Stage III, before anything is trained.

    python -m trainer.planning.plan --config configs/wan-1.3b.yaml --gpus 64

Memory follows from the formulas of `--dry-run` (trainer/planning/memory.py), operations are those of the stages' own
updates, counted on the meta device (trainer/planning/flops.py). Hours are operations / (GPUs · --device-flops · --mfu):
the `mfu` of a run's metrics.jsonl is the true share. What is read and written, validation and the making of pairs
(`preference.build --dry-run`) come on top. `--check` takes seconds: it refuses batches that the GPUs cannot share and
weights that are missing, and says how much disk the stages need.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed looks for one on import; none is touched here

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from common.command_line import add_config_options, load_sections
from common.config import Section
from common.errors import UserError, run_command
from datagen.dataset.loader import Batch
from pipeline.model.config import ModelConfig
from pipeline.model.prompts import load_prompts
from trainer.config import TrainerConfig
from trainer.planning.dry_run import meta_networks, parameters_of
from trainer.planning.flops import BareNetwork, flops_per_sample
from trainer.planning.memory import GIB
from trainer.planning.stage_memory import stage_memory
from trainer.stages import find_stage
from trainer.stages.stage import StageSetup, StageSpec

#: in the order of the paper
STAGES = ("base", "progressive", "dual_stream", "preference")
#: dense bf16 FLOP/s of an H100 or H200 (trainer/monitoring/throughput.py)
DEVICE_FLOPS = 989e12
#: share of them that training reaches; an assumption [ours]
MFU = 0.35
#: tokens of a prompt where there are none yet [peer: Wan2.1's umT5]
_PROMPT_TOKENS = 512
#: bytes per trained parameter in a checkpoint: masters and moments, masters alone, EMA
_STATE, _MASTERS, _EMA = 12, 4, 4
_BF16 = 2


class _Clips(Section):
    """Of the section `datagen`, which belongs to a room above, what the size of a step depends on."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    clip: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes.

    Attributes:
        petaflop: operations of one step over all GPUs, in 10¹⁵.
        gpu_gib: peak memory of each GPU.
        storage_gib: its checkpoints and models.
    """

    stage: str
    steps: int
    batch: int
    petaflop: float
    hours: float
    gpu_gib: float
    storage_gib: float


def plan_stage(
    stage: StageSpec, model: ModelConfig, config: TrainerConfig, latent: tuple[int, int, int], gpus: int, rate: float
) -> StagePlan:
    """
    Args:
        latent: (T, h, w) of one clip.
        rate: FLOP/s that each GPU reaches.

    Raises:
        UserError: the GPUs cannot share the batches.
    """
    micro_batch = config.micro_batch_of(stage, gpus)
    modules = meta_networks(stage, model, config)
    counts, trained = parameters_of(stage, config, modules)
    memory = stage_memory(stage, model, config, gpus, latent, micro_batch, counts, trained)
    storage = _storage(stage, config, modules)  # before the counting, which freezes them
    steps, batch = config.steps_of(stage), config.schedules[stage.name].global_batch_size
    operations = _operations(stage, model, config, modules, latent, steps) * batch
    return StagePlan(
        stage.name,
        steps,
        batch,
        operations / steps / 1e15,
        operations / (gpus * rate) / 3600,
        memory.peak,
        storage / GIB,
    )


def _operations(
    stage: StageSpec,
    model: ModelConfig,
    config: TrainerConfig,
    modules: dict[str, nn.Module],
    latent: tuple[int, int, int],
    steps: int,
) -> float:
    """Of all steps, per sample of the global batch; steps with one objective count once."""

    prompts = load_prompts(model.prompts).embed([""]).shape[1] if model.prompts.is_dir() else _PROMPT_TOKENS

    def embed(captions: list[str]) -> Tensor:
        return torch.empty(len(captions), prompts, model.transformer.text_dim, device="meta")

    built = stage.build(
        _MetaSetup(
            stage,
            config.section_of(stage),
            modules,
            engine_of=config.engine_of,
            embed=embed,
            seed=config.seed,
            device="meta",
            model_shift=model.shift,
        )
    )
    shape = (1, model.transformer.latent_channels, *latent)
    tensors = {name: torch.empty(shape, device="meta") for name in ("z_hr", "z_lr", "z_win", "z_lose")}
    metadata = [{"caption": "", "noise_win": ["win"], "noise_lose": ["lose"]}]
    batch = Batch(["clip"], tensors, metadata)
    first: dict[str, int] = {}
    objectives: Counter[str] = Counter()
    for step in range(steps):
        name = built.objective(step)
        first.setdefault(name, step)
        objectives[name] += 1
    return sum(count * flops_per_sample(built, first[name], batch) for name, count in objectives.items())


class _MetaSetup(StageSetup):
    """Networks without engines and values."""

    def network(self, name: str, parameter_groups: Any = None) -> Any:
        module, learns = self.modules[name], self.spec.network(name).optimizer_of(self.config) is not None
        return BareNetwork(
            module, [n for n, parameter in module.named_parameters() if learns and parameter.requires_grad]
        )


def _storage(stage: StageSpec, config: TrainerConfig, modules: dict[str, nn.Module]) -> float:
    """Bytes of the checkpoints that are kept, one being written, and the models."""
    counts, trained = parameters_of(stage, config, modules)
    checkpoint = 0
    for name, learning in trained.items():
        network = stage.network(name)
        checkpoint += learning * ((_STATE if network.moments else _MASTERS) + (_EMA if network.ema else 0))
    schedule = config.schedules[stage.name]
    kept = config.keep_checkpoints + 1 + bool(schedule.keep_best and schedule.validate_every)
    width = 2 if config.export_precision == "bf16" else 4
    models = counts[stage.networks[0].name] * width * (1 + stage.kept_models)
    return kept * checkpoint + models


def clip_latent(text: str | None, clips: dict[str, Any]) -> tuple[int, int, int]:
    """(T, h, w) of `--clip`, or of the preset's `datagen.clip`.

    Raises:
        UserError: neither says it, or not as FRAMESxHEIGHTxWIDTH.
    """
    if text is None and not {"frames", "crop"} <= clips.keys():
        raise UserError("the preset gives no datagen.clip.frames and .crop: give --clip 21x704x1280")
    try:
        numbers = text.split("x") if text else [clips["frames"], *clips["crop"]]
        frames, height, width = (int(number) for number in numbers)
    except ValueError:
        raise UserError(f"--clip {text}: write FRAMESxHEIGHTxWIDTH, for instance 21x704x1280") from None
    return (frames - 1) // 4 + 1, height // 8, width // 8


def check(model: ModelConfig, config: TrainerConfig, gpus: int) -> float:
    """GiB of disk that the stages need; fails now instead of after days.

    Raises:
        UserError: all that is missing; batches that the GPUs cannot share.
    """
    stages = [find_stage(name) for name in STAGES]
    for stage in stages:
        config.micro_batch_of(stage, gpus)
    folders = {"vae": model.vae, "prompts": model.prompts, "initial_weights": model.initial_weights}
    missing = [f"model.{name} {folder}" for name, folder in folders.items() if folder and not folder.is_dir()]
    if missing:
        raise UserError(f"no folder {', '.join(missing)}: docs/training.md says where they come from")
    return sum(_storage(stage, config, meta_networks(stage, model, config)) for stage in stages) / GIB


def table(stages: list[StagePlan], latent: tuple[int, int, int], model: ModelConfig, gpus: int, rate: float) -> str:
    """For people."""
    lines = [f"{gpus} GPUs, {rate / 1e12:.0f} TFLOP/s each; latents of {latent[0]} x {latent[1]} x {latent[2]}", ""]
    lines.append(
        f"{'stage':<12} {'steps':>7} {'batch':>6} {'PFLOP/step':>11} {'hours':>8} {'GiB/GPU':>8} {'disk GiB':>9}"
    )
    for one in stages:
        lines.append(
            f"{one.stage:<12} {one.steps:>7} {one.batch:>6} {one.petaflop:>11.4g} {one.hours:>8.3g} "
            f"{one.gpu_gib:>8.1f} {one.storage_gib:>9.1f}"
        )
    hours, disk = sum(one.hours for one in stages), sum(one.storage_gib for one in stages)
    lines.append(f"{'together':<12} {'':>7} {'':>6} {'':>11} {hours:>8.3g} {'':>8} {disk:>9.1f}")
    each = model.transformer.latent_channels * math.prod(latent) * _BF16
    lines += [
        "",
        f"of 1000 clips {2000 * each / GIB:.3g} GiB of latents, of 1000 pairs {3000 * each / GIB:.3g} GiB; "
        "stored clips (datagen.store_clips) come on top",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_config_options(parser)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--clip", metavar="FRAMESxHEIGHTxWIDTH", help="default: the preset's datagen.clip")
    parser.add_argument("--device-flops", type=float, default=DEVICE_FLOPS, help="of one GPU, dense bf16")
    parser.add_argument("--mfu", type=float, default=MFU, help="share of them that is reached")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--check", action="store_true", help="only refuse what could not be trained")
    arguments = parser.parse_args()
    model, config, clips = load_sections(arguments, model=ModelConfig, trainer=TrainerConfig, datagen=_Clips)
    if arguments.check:
        print(f"needs {check(model, config, arguments.gpus):.1f} GiB of disk for checkpoints and models")
        return
    latent, rate = clip_latent(arguments.clip, clips.clip), arguments.device_flops * arguments.mfu
    stages = [plan_stage(find_stage(name), model, config, latent, arguments.gpus, rate) for name in STAGES]
    if arguments.json:
        print(json.dumps([asdict(one) for one in stages]))
    else:
        print(table(stages, latent, model, arguments.gpus, rate))


if __name__ == "__main__":
    run_command(main)

"""Which settings fit: GPUs x memory x clip, from the formulas of trainer/planning/memory.py.

python benchmarks/recipes.py    # writes docs/recipes.md
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

from common.config import load_section
from pipeline.model.config import ModelConfig
from trainer.config import TrainerConfig
from trainer.engine.config import DeepSpeedConfig
from trainer.planning.dry_run import count_parameters, meta_networks
from trainer.planning.stage_memory import stage_memory
from trainer.stages import STAGES
from trainer.stages.stage import StageSpec

ROOT = Path(__file__).resolve().parent.parent
PRESET = ROOT / "configs" / "wan-1.3b.yaml"
DOCUMENT = ROOT / "docs" / "recipes.md"

GPUS = (1, 2, 4, 8, 16, 32, 64)
MEMORY_GIB = (24, 48, 80, 141)
#: (frames, height, width)
CLIPS = [
    (21, 256, 256),
    *((frames, 480, 832) for frames in (21, 81)),
    *((frames, 704, 1280) for frames in (21, 41, 81)),
    *((frames, 1088, 1920) for frames in (21, 41, 81)),
]
#: of what is left beside CUDA's context and NCCL, the share that tensors get; the allocator's gaps take the rest
USABLE_SHARE, CONTEXT_GIB = 0.9, 1.5
LARGEST_MICRO_BATCH = 8
#: (checkpointing, ZeRO stage, offloaded optimizer, ranks that share a clip), fastest first
SETTINGS = [
    *((checkpointing, zero, False, 1) for checkpointing in (False, True) for zero in (1, 2, 3)),
    *((True, 3, False, shared) for shared in (2, 4)),
    *((True, 3, True, shared) for shared in (1, 2, 4)),
]


def recipe(
    stage: StageSpec,
    model: ModelConfig,
    preset: TrainerConfig,
    counts: tuple[dict[str, int], dict[str, int]],
    gpus: int,
    memory_gib: float,
    clip: tuple[int, int, int],
) -> str:
    """The first of SETTINGS that fits, with the largest micro-batch it leaves room for; "–" if none does."""
    frames, height, width = clip
    latent = ((frames - 1) // 4 + 1, height // 8, width // 8)
    limit = USABLE_SHARE * (memory_gib - CONTEXT_GIB)
    global_batch = preset.schedules[stage.name].global_batch_size
    for checkpointing, zero, offload, shared in SETTINGS:
        if gpus % shared or (gpus == 1 and zero > 1 and not offload):
            continue
        batch, fits = 1, 0
        while batch <= LARGEST_MICRO_BATCH and batch * (gpus // shared) <= global_batch:
            engine = DeepSpeedConfig(
                zero_stage=zero,  # type: ignore[arg-type]
                activation_checkpointing=checkpointing,
                offload_optimizer=offload,
                gradient_accumulation=global_batch // (batch * (gpus // shared)),
            )
            config = preset.model_copy(update={"engine": engine, "sequence_parallel": shared})
            if stage_memory(stage, model, config, gpus, latent, batch, *counts).peak > limit:
                break
            fits, batch = batch, 2 * batch
        if fits:
            parts = [f"Z{zero}", "c" * checkpointing, "o" * offload, f"s{shared}" * (shared > 1), f"×{fits}"]
            return " ".join(part for part in parts if part)
    return "–"


def table(stage: StageSpec, model: ModelConfig, preset: TrainerConfig) -> str:
    """Markdown: one row per machine, one column per clip."""
    networks = meta_networks(stage, model, preset)
    counts = (
        {name: count_parameters(network) for name, network in networks.items()},
        {name: count_parameters(n, trained=True) for name, n in networks.items() if stage.network(name).optimizer},
    )
    titles = [f"{frames} × {height} × {width}" for frames, height, width in CLIPS]
    lines = [f"| GPUs | GiB each | {' | '.join(titles)} |", "|---" * (len(CLIPS) + 2) + "|"]
    for memory in MEMORY_GIB:
        for gpus in GPUS:
            cells = [recipe(stage, model, preset, counts, gpus, memory, clip) for clip in CLIPS]
            lines.append(f"| {gpus} | {memory} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    model = load_section(PRESET, "model", ModelConfig)
    preset = load_section(PRESET, "trainer", TrainerConfig)
    lora_path = PRESET.with_name("wan-1.3b-lora.yaml")
    lora = load_section(lora_path, "trainer", TrainerConfig)
    DOCUMENT.write_text(f"""# Recipes

What fits into which GPUs for Wan2.1-T2V-1.3B in bf16 with float32 masters, by the formulas of
[`trainer/planning/memory.py`](../trainer/planning/memory.py). **No figure here was measured on a GPU.** The formulas
are checked on a CPU, where tests count the bytes of all live tensors: of blocks, of networks at ZeRO 1, 2 and 3,
and over whole steps
([`tests/trainer/test_memory.py`](../tests/trainer/test_memory.py)). Assumed are {CONTEXT_GIB} GiB for CUDA and NCCL,
and {USABLE_SHARE:.0%} of the rest for tensors, since an allocator leaves gaps; and, from DeepSpeed's source,
what ZeRO-3 keeps gathered. To compare with a GPU:

    python benchmarks/memory.py --config configs/wan-1.3b.yaml --stage dual_stream --latent 6 88 160

`--dry-run` gives the sum of one configuration in detail.

Clips are frames × height × width of the HR side, multiples of 16 pixels. Each cell is the first that fits of: no
checkpointing at ZeRO 1, 2, 3; with it; clips shared by 2 or 4 GPUs; the optimizer on the host.

| sign | setting |
|---|---|
| `Z1`, `Z2`, `Z3` | `trainer.engine.zero_stage` |
| `c` | `trainer.engine.activation_checkpointing=true` |
| `s2`, `s4` | `trainer.sequence_parallel=2`, `4` |
| `o` | `trainer.engine.offload_optimizer=true` |
| `×b` | clips per micro-batch; `trainer.engine.gradient_accumulation` = global batch / (GPUs / s · b) |
| – | does not fit |

The preset is at ZeRO-1 with compiled blocks. Where the table says `Z3`, add
`--set trainer.engine.zero_stage=3 --set trainer.compile_blocks=false`: ZeRO-3's hooks break blocks into dozens of
graphs, so the combination is refused.

## Attention kernels

`trainer.attention: auto` takes the first that is there, and the log says which and why not the others:

| kernel | GPU | what it needs |
|---|---|---|
| `flash3` | Hopper | FlashAttention-3's `flash_attn_interface`, built from source |
| `cudnn` | Hopper | nothing: PyTorch's own cuDNN kernels |
| `flash` | Ampere and later | `flash-attn`, built from source against the installed torch (`--no-build-isolation`) |
| `xformers` | any | `xformers`; 0.0.35 needs torch 2.10 or later |
| `native` | any, and the CPU | nothing: PyTorch's scaled_dot_product_attention |

All have a backward pass. None of them has run on a GPU here.

## dual_stream

Three networks; the student's graph waits while both score models' are built and walked. Global batch
{preset.schedules["dual_stream"].global_batch_size}.

{table(STAGES["dual_stream"], model, preset)}

## dual_stream with LoRA

`configs/wan-1.3b-lora.yaml`: student and fake score learn adapters.

{table(STAGES["dual_stream"], model, lora)}

## base

One network. Global batch {preset.schedules["base"].global_batch_size}.

{table(STAGES["base"], model, preset)}

Written by `python benchmarks/recipes.py`.
""")
    print(f"wrote {DOCUMENT}")


if __name__ == "__main__":
    main()

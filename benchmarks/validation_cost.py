"""What share of Stage II's time validation takes at the 1.3 B shape, by counted operations, at 8 to 64 GPUs.

    python benchmarks/validation_cost.py [--config configs/wan-1.3b.yaml]

One look is what the rank with the most clips does while the others wait: the previews of each of its clips and the
decoding of what they show. `before` is the way this project once had: one rank looks at all clips, and decodes the
target and z_LR of each at every look again. Rounds and looks are counted on the meta device (nothing is computed), the
VAE is Wan2.1's. A decoder reaches fewer operations a second than matrix products do, so `--decoder-efficiency` divides
its rate: 1 counts operations alone.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, from anywhere

from benchmarks.dual_stream_step import build_modules, build_stage, make_batch, round_of_ours
from common.config import load_section
from trainer.config import TrainerConfig
from trainer.planning.flops import UntrackedModules
from trainer.stages.dual_stream.config import DualStreamConfig

GPUS = (8, 16, 32, 64)
#: decoded once for a run now, at every look before: the target and z_LR
CONSTANT_CLIPS = 2


def counted(run: Any) -> float:
    """Floating-point operations of `run()`."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = UntrackedModules()
    with counter:
        run()
    return float(counter.get_total_flops())


def count(arguments: argparse.Namespace) -> dict[str, float]:
    """Operations of one clip's round, previews and decoding, by name; `previews_shown` is how many it decodes."""
    config = DualStreamConfig()
    batch = make_batch("wan-1.3b", "meta", arguments)
    stage = build_stage(build_modules("wan-1.3b", "meta", torch.bfloat16, config), "wan-1.3b", "meta", config)
    shown: dict[str, Any] = {}
    with torch.no_grad():
        previews = counted(lambda: shown.update(stage.previews(batch)))
    with torch.device("meta"):
        vae = AutoencoderKLWan().requires_grad_(False).to(torch.bfloat16)
    z = batch.tensors["z_hr"].to(torch.bfloat16)
    return {
        "round": counted(lambda: round_of_ours(stage, batch)),
        "previews": previews,
        "decode": counted(lambda: vae.decode(z)),
        "previews_shown": float(len(shown)),
    }


def shares(operations: dict[str, float], arguments: argparse.Namespace) -> dict[int, dict[str, float]]:
    """By number of GPUs, the share of the time that looks take, before and now."""
    trainer = load_section(arguments.config, "trainer", TrainerConfig)
    schedule, clips = trainer.schedules["dual_stream"], trainer.validation_clips
    decode = operations["decode"] / arguments.decoder_efficiency
    shown = operations["previews_shown"]
    result = {}
    for gpus in GPUS:
        between = schedule.validate_every * operations["round"] * schedule.global_batch_size / gpus
        of_one_rank = -(-clips // gpus)
        before = clips * (operations["previews"] + (shown + CONSTANT_CLIPS) * decode)
        now = of_one_rank * (operations["previews"] + shown * decode)
        result[gpus] = {"before": before / (between + before), "now": now / (between + now)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/wan-1.3b.yaml"))
    parser.add_argument("--frames", type=int, default=21)
    parser.add_argument("--height", type=int, default=704)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument(
        "--decoder-efficiency", type=float, default=1.0, help="the decoder's share of the DiT's FLOP/s, in (0, 1]"
    )
    arguments = parser.parse_args()
    arguments.batch = 1
    operations = count(arguments)
    table = shares(operations, arguments)
    lines = [
        f"# command: python benchmarks/validation_cost.py {' '.join(sys.argv[1:])}".rstrip(),
        f"one clip of {arguments.frames} x {arguments.height} x {arguments.width}, TFLOP: "
        + ", ".join(f"{name} {operations[name] / 1e12:.0f}" for name in ("round", "previews", "decode")),
        "| GPUs | before, % of the time | now, % |",
        "|---|---|---|",
        *(f"| {gpus} | {100 * row['before']:.2f} | {100 * row['now']:.2f} |" for gpus, row in table.items()),
        json.dumps({"operations": operations, "share": table}),
    ]
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""The moving image of the README: a held-out clip, bicubic beside one step of a model, looping.

python benchmarks/effect/readme_clip.py --output docs/images/effect.webp [--clip bikes-cyclist] [--frames 17]

Forwards, then backwards: no jump where the loop closes. The clip is degraded as in score.py, seed 0.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a file, from anywhere

from benchmarks.effect.held_out import CLIPS
from benchmarks.effect.score import RECIPE, SEEDS, SMALL, bicubic, model_upscaler
from common.atomic import atomic_file
from common.errors import UserError, run_command
from datagen.degradation.degrade import degrade_clip
from metrics.labelled_grid import labelled_grid

MILLISECONDS_PER_FRAME = 100
#: of WebP, 0…100
QUALITY = 82


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="a .webp file")
    parser.add_argument("--clip", default="bikes-cyclist", help="a name of held_out.py")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--model", type=Path, default=SMALL, help="model folder")
    arguments = parser.parse_args()
    found = [clip for clip in CLIPS if clip.name == arguments.clip]
    if not found:
        raise UserError(f"--clip {arguments.clip}: choose {', '.join(clip.name for clip in CLIPS)}")
    torch.set_num_threads(1)
    low, _ = degrade_clip(replace(found[0], count=arguments.frames).frames(), RECIPE, SEEDS[0])
    videos = {"bicubic": bicubic(low), "one step": model_upscaler(arguments.model, None)(low)}
    forwards = [
        labelled_grid([(name, Image.fromarray(video[index])) for name, video in videos.items()], columns=2)
        for index in range(len(low))
    ]
    loop = forwards + forwards[-2:0:-1]
    with atomic_file(arguments.output) as temporary:
        loop[0].save(
            temporary, save_all=True, append_images=loop[1:], duration=MILLISECONDS_PER_FRAME, loop=0, quality=QUALITY
        )
    print(f"{arguments.output}: {len(loop)} frames, {arguments.output.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    run_command(main)

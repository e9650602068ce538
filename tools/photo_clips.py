"""Turn photographs into clips: a window that pans, zooms and turns over an image, as a lossless video.

    python -m tools.photo_clips --input DIR_OR_PICTURE … --output DIR [--clips-per-photo 6] [--shrink 0.25 0.9]

For tiny models on machines without a video collection: Debian's wallpaper packages hold sharp photographs whose
licences allow it. The motion is exact (cubic interpolation at sub-pixel positions), so there is no compression
to learn.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from common.errors import UserError, run_command
from common.lossless_clip import write_lossless
from common.progress import progress
from common.seeding import derive_seed

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
#: a photograph smaller than this on its short side is an icon or a preview
SHORT_SIDE_PIXELS = 700


def find_photos(inputs: list[Path]) -> list[Path]:
    """Images under `inputs`, sorted; symbolic links (the packages' smaller copies) are left out."""
    found: set[Path] = set()
    for entry in inputs:
        if not entry.exists():
            raise UserError(f"--input {entry} does not exist")
        candidates = entry.rglob("*") if entry.is_dir() else [entry]
        found |= {path for path in candidates if path.suffix.lower() in SUFFIXES and not path.is_symlink()}
    if not found:
        raise UserError(f"no image ({', '.join(SUFFIXES)}) under {', '.join(map(str, inputs))}")
    return sorted(found)


def moving_crop(
    photo: np.ndarray, frames: int, size: int, shrink: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """One clip, uint8 (frames, size, size, 3), over `photo` (uint8 (H, W, 3)) shrunk by a random factor.

    Shrinking is by area averaging, so that what the sensor or JPEG blurred becomes sharp again.

    Args:
        shrink: range of the factor, drawn uniform in its logarithm; a small photograph is shrunk less.
    """
    margin = 1.35
    scale = max(float(np.exp(rng.uniform(*np.log(shrink)))), size * margin / min(photo.shape[:2]))
    small = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else photo
    height, width = small.shape[:2]
    half = size / 2
    inset = min(half + 16, min(height, width) / 2)
    centre = np.array([rng.uniform(inset, width - inset), rng.uniform(inset, height - inset)])
    moving = rng.random() < 0.7
    pan = rng.normal(0, 1.5, 2) * moving  # pixels per frame
    zoom, turn = rng.normal(0, 0.004) * moving, rng.normal(0, 0.004) * moving
    clip = []
    for frame in range(frames):
        angle, factor = turn * frame, 1 + zoom * frame
        rotation = factor * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        corner = centre + pan * (frame - frames / 2) - rotation @ np.array([half - 0.5, half - 0.5])
        clip.append(
            cv2.warpAffine(
                small,
                np.hstack([rotation, corner[:, None]]),
                (size, size),
                flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
                borderMode=cv2.BORDER_REFLECT,
            )
        )
    return np.stack(clip)


def _clips(photo: np.ndarray, name: str, arguments: argparse.Namespace) -> Iterator[tuple[str, np.ndarray]]:
    for number in range(arguments.clips_per_photo):
        rng = np.random.default_rng(derive_seed(arguments.seed, name, number))
        yield f"{name}-{number:02d}", moving_crop(photo, arguments.frames, arguments.size, arguments.shrink, rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="folders or images")
    parser.add_argument("--output", type=Path, required=True, help="folder of the videos")
    parser.add_argument("--clips-per-photo", type=int, default=6)
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--size", type=int, default=192, help="side of the square clip in pixels")
    parser.add_argument(
        "--shrink", type=float, nargs=2, default=(0.25, 0.9), metavar=("LOW", "HIGH"),
        help="range of the factor by which photographs are shrunk; below 0.4, 4K photographs are sharp to the pixel",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not 0 < arguments.shrink[0] <= arguments.shrink[1] <= 1:
        raise UserError(f"--shrink {arguments.shrink}: two factors, 0 < LOW <= HIGH <= 1")
    photos = find_photos(arguments.input)
    arguments.output.mkdir(parents=True, exist_ok=True)
    written = skipped = 0
    with progress(len(photos), "photographs", "photo") as bar:
        for path in photos:
            photo = cv2.imread(str(path), cv2.IMREAD_COLOR)
            if photo is None or min(photo.shape[:2]) < SHORT_SIDE_PIXELS:
                skipped += 1
            else:
                name = re.sub(r"[^A-Za-z0-9]+", "-", "-".join(path.with_suffix("").parts[-4:])).strip("-")
                for stem, clip in _clips(cv2.cvtColor(photo, cv2.COLOR_BGR2RGB), name, arguments):
                    write_lossless(arguments.output / f"{stem}.mp4", clip)
                    written += 1
            bar.advance(1, clips=written)
    print(
        f"{written} clips from {len(photos) - skipped} photographs in {arguments.output}; "
        f"{skipped} too small or unreadable"
    )


if __name__ == "__main__":
    run_command(main)

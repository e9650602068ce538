"""Which copies and which different videos are called duplicates: today's perceptual hash beside the difference hash.

    python benchmarks/duplicate_table.py --photos FOLDER [--output FOLDER]             # JPEG files: photographs
    python benchmarks/duplicate_table.py --photos FOLDER --drawings --clips 8         # drawn backgrounds as well

A clip is a slow pan over part of a photograph. Its frames are hashed as the survey hashes them, those of a copy after
x264 has encoded them. Two clips are duplicates by the rule of the plan: the hashes of the first, middle and last frame
all differ in fewer bits than the distance. False pairs are counted among all pairs of clips of different photographs,
true copies between clips and their copies. The difference hash at distance 5 is what was used before; it judges every
frame.

Files that are called alike but for size or colour (`tree_1920x1080.jpg`, `tree-dark.png`) are one photograph, of which
the largest file is taken. Screenshots, small files and such with transparent places are left out. Without --drawings
only JPEG files are taken, as photographs are JPEG files and drawings are not, with few exceptions. With --output the
table is written there as Markdown and JSON. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from PIL import Image

from common.errors import UserError, run_command
from common.progress import progress
from common.video_probe import ffmpeg_binary
from datagen.config import FilterConfig
from datagen.survey.perceptual_hash import perceptual_hash
from datagen.survey.video_survey import small_video_frame, to_thumbnail

PHOTOGRAPHS, DRAWINGS = (".jpg", ".jpeg"), (".png", ".webp")
FRAMES, HEIGHT, WIDTH = 9, 360, 640
#: px a frame
PAN = 2
#: larger photographs are made this wide or high first, px
LARGEST_SIDE = 1920
#: frames that the trimmed copy lacks at its beginning
TRIMMED = 3
#: of the difference hash, as it was used
DIFFERENCE_DISTANCE = 5
HASHES = {"difference hash": DIFFERENCE_DISTANCE, "DCT hash": FilterConfig().duplicate_distance}
#: name -> (FFmpeg's filter, x264's crf)
COPIES = {
    "crf 28": ("null", 28),
    "crf 32, half size": ("scale=iw/2:ih/2", 32),
    "brightness +8 %": ("eq=brightness=0.08", 23),
    "6 % cropped": ("crop=iw*0.94:ih*0.94", 23),
    f"crf 28, {TRIMMED} frames trimmed": ("null", 28),
}
RENDITION = re.compile(r"[-_ ]?\d{3,}x\d{3,}$|[-_](d|l|dark|light|cold|warm|radioactive)(?=$|[-_])", re.IGNORECASE)

#: of a clip, bits of 64 and whether there is a hash, (3, 64) and (3,), by the name of the hash
Hashed = dict[str, tuple[np.ndarray, np.ndarray]]


def photographs(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The largest file of each photograph below `folder`."""
    best: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in suffixes and path.is_file() and not path.is_symlink() and path.stem != "screenshot":
            parts = (*path.parent.parts, path.stem)
            name = "/".join(RENDITION.sub("", part) for part in parts)
            if name not in best or path.stat().st_size > best[name].stat().st_size:
                best[name] = path
    return sorted(best.values())


def clips_of(photograph: np.ndarray, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Pans over parts of a photograph, each uint8 (FRAMES + TRIMMED, HEIGHT, WIDTH, 3) RGB."""
    scale = min(1.0, LARGEST_SIDE / max(photograph.shape[:2]))
    photograph = cv2.resize(photograph, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    height, width = photograph.shape[:2]
    frames = FRAMES + TRIMMED
    clips = []
    for _ in range(count):
        part_width = int(min(width, height * WIDTH / HEIGHT) * rng.uniform(0.45, 1.0))
        part_height = part_width * HEIGHT // WIDTH
        top, left = rng.integers(0, height - part_height + 1), rng.integers(0, width - part_width + 1)
        part = photograph[top : top + part_height, left : left + part_width]
        wide = cv2.resize(part, (WIDTH + PAN * frames, HEIGHT), interpolation=cv2.INTER_AREA)
        clips.append(np.stack([wide[:, PAN * index : PAN * index + WIDTH] for index in range(frames)]))
    return clips


def encoded(clip: np.ndarray, filters: str, crf: int, path: Path) -> Path:
    """Write a copy by x264."""
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{clip.shape[2]}x{clip.shape[1]}", "-r", "25", "-i", "pipe:"]
    x264 = ["-vf", f"{filters},format=yuv420p", "-c:v", "libx264", "-crf", str(crf), "-threads", "1"]
    command = [ffmpeg_binary(), "-loglevel", "error", "-y", *raw, *x264, str(path)]
    subprocess.run(command, input=np.ascontiguousarray(clip).tobytes(), check=True)
    return path


def read(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


def hashes_of(frames: list[av.VideoFrame]) -> Hashed:
    """Both hashes of the first, middle and last frame."""
    thumbnails = [
        to_thumbnail(cv2.cvtColor(small_video_frame(frames[index]), cv2.COLOR_BGR2GRAY))
        for index in (0, len(frames) // 2, -1)
    ]
    values = [perceptual_hash(thumbnail) for thumbnail in thumbnails]
    bits = np.array([[(value or 0) >> place & 1 for place in range(64)] for value in values], bool)
    return {
        "difference hash": (np.stack([_difference_hash(thumbnail) for thumbnail in thumbnails]), np.ones(3, bool)),
        "DCT hash": (bits, np.array([value is not None for value in values])),
    }


def _difference_hash(thumbnail: np.ndarray) -> np.ndarray:
    """bool (64,): is each cell of a 9 x 8 grid brighter than its right neighbour?"""
    grid = cv2.resize(thumbnail, (9, 8), interpolation=cv2.INTER_AREA).astype(np.int16)
    return (grid[:, :-1] > grid[:, 1:]).reshape(-1)


def farthest(first: list[Hashed], second: list[Hashed], name: str) -> np.ndarray:
    """int (N, M): the largest distance over the three frames; 64 where a frame has no hash."""
    bits, known = (np.stack([hashed[name][part] for hashed in first]) for part in (0, 1))
    other, other_known = (np.stack([hashed[name][part] for hashed in second]) for part in (0, 1))
    distances = np.stack(
        [np.count_nonzero(bits[:, None, frame] != other[None, :, frame], axis=-1) for frame in range(3)]
    ).max(0)
    return np.where(known.all(1)[:, None] & other_known.all(1)[None], distances, 64)


def measure(photos: list[Path], clips_each: int, copies: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    to_copy = set(rng.permutation(len(photos) * clips_each)[:copies].tolist())
    originals: list[Hashed] = []
    photo_of: list[int] = []
    copied: list[int] = []
    hashed_copies: dict[str, list[Hashed]] = {name: [] for name in COPIES}
    with tempfile.TemporaryDirectory() as folder, progress(len(photos), "hash", "photographs") as bar:
        for number, path in enumerate(photos):
            photograph = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
            for clip in clips_of(photograph, clips_each, rng):
                frames = np.ascontiguousarray(clip[:FRAMES])
                if len(originals) in to_copy:
                    copied.append(len(originals))
                    for name, (filters, crf) in COPIES.items():
                        start = TRIMMED if "trimmed" in name else 0
                        copy = encoded(clip[start : start + FRAMES], filters, crf, Path(folder) / "copy.mkv")
                        hashed_copies[name].append(hashes_of(read(copy)))
                originals.append(hashes_of([av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in frames]))
                photo_of.append(number)
            bar.advance(1)
    different = np.triu(np.array(photo_of)[:, None] != np.array(photo_of)[None], 1)
    sources = [originals[index] for index in copied]
    rows: dict[str, Any] = {}
    for name, distance in HASHES.items():
        distances = farthest(originals, originals, name)
        false = np.argwhere(different & (distances < distance))
        rows[name] = {
            "distance": distance,
            "false_pairs": len(false),
            "without_verdict": int(sum(not hashed[name][1].all() for hashed in originals)),
            "copies_without_verdict": int(sum(not hashed[name][1].all() for hashed in sources)),
            "found": {
                kind: int(np.count_nonzero(np.diagonal(farthest(sources, hashed, name)) < distance))
                for kind, hashed in hashed_copies.items()
            },
            "nearest_false": sorted(
                (int(distances[a, b]), photos[photo_of[a]].name, photos[photo_of[b]].name)
                for a, b in np.argwhere(different & (distances < distance + 6))
            )[:10],
        }
    return {
        "photographs": len(photos),
        "clips": len(originals),
        "pairs": int(np.count_nonzero(different)),
        "copies": len(copied),
        "seed": seed,
        "hashes": rows,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    head = ["hash", "distance", f"false of {result['pairs']:,} pairs", *COPIES, "clips without verdict"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, row in result["hashes"].items():
        found = [f"{row['found'][kind]} of {result['copies']}" for kind in COPIES]
        cells = [name, f"< {row['distance']}", f"{row['false_pairs']:,}", *found]
        lines.append(f"| {' | '.join(cells)} | {row['without_verdict']} of {result['clips']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs, searched below")
    parser.add_argument("--clips", type=int, default=16, help="of each photograph")
    parser.add_argument("--copies", type=int, default=80, help="clips that are copied")
    parser.add_argument("--seed", type=int, default=0, help="of the places of the clips")
    parser.add_argument("--drawings", action="store_true", help="also PNG and WebP files")
    parser.add_argument("--output", type=Path, help="folder for the table")
    arguments = parser.parse_args()
    suffixes = PHOTOGRAPHS + DRAWINGS if arguments.drawings else PHOTOGRAPHS
    photos = [path for path in photographs(arguments.photos, suffixes) if _is_usable(path)]
    if len(photos) < 2:
        wanted = f"at least 2 of {WIDTH} x {HEIGHT} px ({', '.join(suffixes)})"
        raise UserError(f"--photos {arguments.photos}: {len(photos)} photographs; give a folder that holds {wanted}")
    result = measure(photos, arguments.clips, arguments.copies, arguments.seed)
    print(table(result))
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        name = "photographs_and_drawings" if arguments.drawings else "photographs"
        command = (
            f"python benchmarks/duplicate_table.py --photos FOLDER --clips {arguments.clips} --seed {arguments.seed}"
        )
        about = f"`{command}{' --drawings' if arguments.drawings else ''}`: {result['clips']} clips of "
        about += f"{result['photographs']} {name.replace('_', ' ')}"
        (arguments.output / f"{name}.md").write_text(f"{about}.\n\n{table(result)}")
        (arguments.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    rows = result["hashes"].items()
    print(json.dumps({name: {"false_pairs": row["false_pairs"], **row["found"]} for name, row in rows}))


def _is_usable(path: Path) -> bool:
    """Large enough, and without transparent places."""
    with Image.open(path) as image:
        large = image.width >= WIDTH and image.height >= HEIGHT
        return large and not (image.mode == "RGBA" and image.getchannel("A").getextrema()[0] < 255)


if __name__ == "__main__":
    run_command(main)

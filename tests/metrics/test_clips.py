"""Clips as they are found and streamed: order, names, layouts, length, and how many frames are held at once."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from common.encoders import OUTPUT_SUFFIXES
from common.errors import UserError
from common.video_probe import ffmpeg_binary
from metrics.clips import Clip, Frame, find_clips, load_clip, open_clip
from metrics.fit_niqe import fit_niqe
from metrics.frame_metric import ClipSize, FrameMetric, MetricSettings
from metrics.registry import create, create_all
from metrics.scoring import score_clip
from tests.commands import run

ROOT = Path(__file__).parents[2]
SIDE = 100


def picture(path: Path, level: int = 0, side: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), level, np.uint8)).save(path)


def test_unpadded_numbers_are_in_natural_order(tmp_path: Path) -> None:
    for number in (1, 2, 9, 10, 11, 100):
        picture(tmp_path / f"frame{number}.png", number)
    assert (load_clip(tmp_path)[:, 0, 0, 0] * 255).round().int().tolist() == [1, 2, 9, 10, 11, 100]
    for number in (10, 2, 1):
        picture(tmp_path / f"set/clip{number}/1.png")
    assert list(find_clips(tmp_path / "set")) == ["clip1", "clip2", "clip10"]


def test_sixteen_bits_are_read_with_sixteen(tmp_path: Path) -> None:
    levels = np.array([0, 1, 128, 32768, 65534, 65535], np.uint16)
    cv2.imwrite(str(tmp_path / "1.png"), np.broadcast_to(levels[None, :, None], (4, 6, 3)))
    assert torch.equal(load_clip(tmp_path)[0, 0, 0], torch.from_numpy(levels.astype(np.float32) / 65535))


class _Counted(Clip):
    """Frames of one level; it counts as many as it says and gives as many as it has."""

    def __init__(self, counted: int, given: int) -> None:
        super().__init__(Path(f"{counted}-{given}"))
        self.counted, self.given = counted, given

    def _size(self) -> tuple[int, int, int]:
        return self.counted, 8, 8

    def _read(self) -> Iterator[Frame]:
        yield from np.zeros((self.given, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(("video", "reference"), [((3, 2), None), ((3, 4), None), ((3, 3), (3, 4)), ((3, 2), (3, 2))])
def test_a_clip_that_gives_other_than_it_counts_is_not_scored(video, reference) -> None:
    metrics = create_all(["psnr"] if reference else [f"{__name__}:_Level"])
    assert score_clip(_Counted(3, 3), _Counted(3, 3) if reference else None, metrics)
    with pytest.raises(UserError, match="did not give the 3 frames counted"):
        score_clip(_Counted(*video), _Counted(*reference) if reference else None, metrics)


class _Level(FrameMetric):
    name, label, lower_is_better, needs_reference = "level", "level", False, False

    def frame(self, frame: Tensor, reference: Tensor | None = None) -> float:
        return float(frame.mean())


def test_folders_in_folders_and_one_star(tmp_path: Path) -> None:
    picture(tmp_path / "YouHQ/animal/001/1.png")
    picture(tmp_path / "YouHQ/street.day/001/1.png")
    np.save(tmp_path / "YouHQ/night.npy", np.zeros((1, 8, 8, 3), np.uint8))
    (tmp_path / "YouHQ/.cache").mkdir()
    picture(tmp_path / "YouHQ/.cache/hidden/1.png")
    (tmp_path / "YouHQ/._night.mp4").write_bytes(b"attributes of macOS")
    assert list(find_clips(tmp_path / "YouHQ")) == ["animal/001", "night", "street.day/001"]
    picture(tmp_path / "SPMCS/car/truth/1.png")
    picture(tmp_path / "SPMCS/hk/truth/1.png")
    picture(tmp_path / "SPMCS/hk/input4/1.png")
    assert find_clips(tmp_path / "SPMCS/*/truth") == {n: tmp_path / "SPMCS" / n / "truth" for n in ("car", "hk")}
    with pytest.raises(UserError, match="matches no clip"):
        find_clips(tmp_path / "SPMCS/*/absent")
    with pytest.raises(UserError, match="one \\* stands for a folder's whole name"):
        find_clips(tmp_path / "SPM*/truth")
    picture(tmp_path / "SPMCS/preview.png")
    with pytest.raises(UserError, match="holds images and clips"):
        find_clips(tmp_path / "SPMCS")


@pytest.mark.parametrize("suffix", OUTPUT_SUFFIXES)
def test_every_suffix_that_upscale_writes_is_found_and_counted(suffix: str, tmp_path: Path) -> None:
    codec = "libvpx-vp9" if suffix == ".webm" else "libx264"
    source = ["-f", "lavfi", "-i", "testsrc2=size=64x48:rate=25:duration=0.28"]
    command = [ffmpeg_binary(), "-v", "error", *source, "-c:v", codec, "-pix_fmt", "yuv420p"]
    subprocess.run([*command, str(tmp_path / f"a{suffix}")], check=True)
    (path,) = find_clips(tmp_path).values()
    clip = open_clip(path)
    assert clip.size == ClipSize(7, 48, 64) and len(list(clip.frames())) == 7
    assert open_clip(path, 3).size.frames == len(list(open_clip(path, 3).frames())) == 3


class Made(Clip):
    """Frames made on demand, which count how many of them live."""

    def __init__(self, length: int) -> None:
        super().__init__(Path("made"))
        self.length, self.alive, self.most = length, 0, 0

    def _size(self) -> tuple[int, int, int]:
        return self.length, SIDE, SIDE

    def _read(self) -> Iterator[Frame]:
        random = np.random.default_rng(0)
        texture = random.integers(0, 256, (SIDE, SIDE + self.length, 3), np.uint8)
        for index in range(self.length):
            frame = np.ascontiguousarray(texture[:, index : index + SIDE])
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(frame, self._died)
            yield frame

    def _died(self) -> None:
        self.alive -= 1

    def frames(self) -> Iterator[Tensor]:
        for frame in self.read():
            tensor = torch.from_numpy(frame.astype(np.float32) / 255).permute(2, 0, 1)
            tensor.source = frame  # the frame lives as long as its tensor
            yield tensor


def test_no_more_than_a_few_frames_are_held(real_clip: Tensor, tmp_path: Path) -> None:
    model = tmp_path / "niqe.safetensors"
    fit_niqe([real_clip], block=32, sharpness=0.3)[0].save(model, {})
    names = ["psnr", "ssim", "gmsd", "niqe_fitted", "temporal", "temporal_own", "grid", "noise", "vmaf"]
    metrics = create_all(names, MetricSettings(niqe_model=model))
    most = {}
    for length in (6, 30):
        video, reference = Made(length), Made(length)
        scores = score_clip(video, reference, metrics)
        assert scores["psnr"].value == 100
        most[length] = video.most, reference.most
    assert most[6] == most[30] and max(most[30]) <= 4


def test_one_pass_gives_what_each_metric_gives_alone(real_clip: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("pycvvdp")
    clip = real_clip[:, :, :128, :192]
    worse = (clip + 0.05 * torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    for name, frames in (("hr", clip), ("out", worse)):
        np.save(tmp_path / f"{name}.npy", frames.permute(0, 2, 3, 1).numpy())
    metrics = create_all(["psnr", "ssim", "temporal", "vmaf_neg", "cvvdp"])
    scores = score_clip(open_clip(tmp_path / "out.npy"), open_clip(tmp_path / "hr.npy"), metrics)
    assert {name: score.value for name, score in scores.items()} == {m.name: m(worse, clip) for m in metrics}
    inner = score_clip(open_clip(tmp_path / "out.npy"), open_clip(tmp_path / "hr.npy"), metrics[:1], crop_border=3)
    assert inner["psnr"].value == create("psnr")(worse[..., 3:-3, 3:-3], clip[..., 3:-3, 3:-3]) != scores["psnr"].value


def test_cvvdp_is_the_packages_own_on_whole_tensors(real_clip: Tensor) -> None:
    package = pytest.importorskip("pycvvdp")
    clip, worse = real_clip[..., :128, :192], real_clip[..., :128, :192] * 0.9
    own = package.cvvdp(display_name="standard_4k", quiet=True, device=torch.device("cpu"))
    expected, _ = own.predict(worse, clip, dim_order="FCHW", frames_per_second=25)
    assert create("cvvdp")(worse, clip) == float(expected)


def test_an_error_in_the_middle_lets_go_of_programs_and_threads(real_clip: Tensor, tmp_path: Path) -> None:
    """A broken picture stops the command; it ends by itself, with one line."""
    pytest.importorskip("pycvvdp")
    for index, frame in enumerate((real_clip * 255).byte().permute(0, 2, 3, 1).numpy()):
        for name in ("hr", "out"):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(frame).save(tmp_path / name / f"{index}.png")
    (tmp_path / "out/2.png").write_bytes(b"broken")
    line = ["--video", tmp_path / "out", "--reference", tmp_path / "hr", "--metrics", "vmaf,cvvdp"]
    done = run("-m", "metrics.evaluate", *line, "--output", tmp_path / "m.json")
    assert done.returncode == 2 and "2.png is damaged" in done.stderr.splitlines()[-1]


def test_flat_frames_are_left_out_of_niqe_and_counted(
    real_clip: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fit_niqe([real_clip], block=32, sharpness=0.3)[0]
    np.savez(tmp_path / "niqe_pris_params.npz", mu_pris_param=model.mean[None], cov_pris_param=model.covariance)
    monkeypatch.setattr("importlib.metadata.files", lambda name: [])
    frames = torch.cat([real_clip[:2], torch.full_like(real_clip[:1], 0.5)]).permute(0, 2, 3, 1)
    np.save(tmp_path / "faded.npy", frames.numpy())
    np.save(tmp_path / "flat.npy", frames[2:].numpy())
    metric = create("niqe", MetricSettings(weights=tmp_path))
    score = score_clip(open_clip(tmp_path / "faded.npy"), None, [metric])["niqe"]
    assert score.left_out == 1 and score.value == pytest.approx(metric(real_clip[:2]), rel=1e-9)
    with pytest.raises(UserError, match="nothing to measure in any of 1 frames"):
        score_clip(open_clip(tmp_path / "flat.npy"), None, [metric])
    line = ["--video", tmp_path / "faded.npy", "--metrics", "niqe", "--weights", tmp_path]
    from metrics import evaluate

    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, line), "--output", str(tmp_path / "m.json")])
    evaluate.main()
    result = json.loads((tmp_path / "m.json").read_text())
    assert result["left_out"] == {"faded": {"niqe": 1}}
    (protocol,) = result["protocols"]
    assert protocol["weights"].keys() == {"niqe_pris_params.npz"} and len(protocol["weights"].popitem()[1]) == 64


def test_own_flow_needs_no_reference_and_has_its_own_name(real_clip: Tensor) -> None:
    own, guided = create("temporal_own"), create("temporal")
    assert not own.needs_reference and own.label != guided.label
    assert own(real_clip) == guided(real_clip, real_clip)
    noisy = (real_clip + 0.1 * torch.randn(real_clip.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert own(noisy) != guided(noisy, real_clip)

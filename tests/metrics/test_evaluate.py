"""The commands metrics.evaluate and metrics.fit_niqe as people call them, on arrays, pictures and a video."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from common.errors import UserError
from metrics import evaluate, fit_niqe
from metrics.clips import find_clips, load_clip
from metrics.published import load_published
from metrics.registry import METRICS, create, resolve_names
from tests import commands


def write_pictures(folder: Path, video: Tensor) -> None:
    folder.mkdir(parents=True)
    for index, frame in enumerate((video * 255).round().byte().permute(0, 2, 3, 1).numpy()):
        Image.fromarray(frame).save(folder / f"{index:03d}.png")


@pytest.fixture
def folders(tmp_path: Path, real_clip: Tensor) -> Path:
    """Two clips, one as pictures and one as an array, and a damaged version of each."""
    noise = 0.05 * torch.randn(real_clip.shape, generator=torch.Generator().manual_seed(0))
    for name, video in (("hr", real_clip), ("out", (real_clip + noise).clamp(0, 1))):
        write_pictures(tmp_path / name / "first", video[:2])
        np.save(tmp_path / name / "second.npy", video[2:].permute(0, 2, 3, 1).numpy())
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, module: object, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    module.main()  # type: ignore[attr-defined]


def test_folders_are_paired_scored_and_averaged(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = folders / "niqe.safetensors", folders / "metrics.json"
    run(monkeypatch, fit_niqe, "--input", folders / "hr", "--output", model, "--block", 32, "--sharpness", 0.3)
    run(
        monkeypatch, evaluate, "--video", folders / "out", "--reference", folders / "hr", "--output", output,
        "--metrics", "psnr,gmsd,niqe_fitted", "--niqe-model", model, "--published",
    )  # fmt: skip
    result = json.loads(output.read_text())
    assert set(result["clips"]) == {"first", "second"}
    for name in ("psnr", "gmsd", "niqe_fitted"):
        values = [clip[name] for clip in result["clips"].values()]
        assert result["metrics"][name] == pytest.approx(sum(values) / 2)
    first = create("psnr")(load_clip(folders / "out/first"), load_clip(folders / "hr/first"))
    assert result["clips"]["first"]["psnr"] == first
    printed = capsys.readouterr().out
    assert "PSNR ↑" in printed
    assert "not measured here" in printed
    run(
        monkeypatch, evaluate, "--video", folders / "out", "--reference", folders / "hr", "--output", output,
        "--metrics", "psnr,gmsd,ssim",
    )  # fmt: skip
    assert "2 scores computed, 4 found in the cache" in capsys.readouterr().err
    again = json.loads(output.read_text())
    assert all(
        again["clips"][clip][name] == result["clips"][clip][name]
        for clip in again["clips"]
        for name in ("psnr", "gmsd")
    )


def test_one_clip_pairs_with_one_reference_of_another_name(folders: Path) -> None:
    videos, references = evaluate.pair_clips(folders / "out/first", folders / "hr/second.npy")
    assert list(videos) == ["first"]
    assert references == {"first": folders / "hr/second.npy"}


def test_uint8_pictures_and_arrays_read_alike(folders: Path, real_clip: Tensor) -> None:
    np.save(folders / "bytes.npy", (real_clip * 255).round().byte().permute(0, 2, 3, 1).numpy())
    assert torch.equal(load_clip(folders / "bytes.npy"), load_clip(folders / "hr/first").new_tensor(real_clip))
    assert torch.equal(load_clip(folders / "bytes.npy", max_frames=2), load_clip(folders / "hr/first"))


def test_a_lossless_video_scores_as_its_pictures(folders: Path, real_clip: Tensor) -> None:
    import av

    path = folders / "video.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = real_clip.shape[3], real_clip.shape[2], "bgr0"
        for frame in (real_clip * 255).round().byte().permute(0, 2, 3, 1).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    assert torch.equal(load_clip(path), real_clip)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--video", "out"), "psnr, ssim compare with the HR clip: add --reference"),
        (("--video", "out", "--reference", "hr/first"), "has no clip named second"),
        (("--video", "absent", "--reference", "hr"), "no file or folder"),
        (("--video", "out/first", "--reference", "text.mp4"), "text.mp4"),
        (("--video", "out/first", "--reference", "small.npy"), "is 2 frames of 640×272, but its reference"),
        (("--video", "shape.npy", "--reference", "hr/first"), r"shape \(3, 3\)"),
        (("--video", "range.npy", "--reference", "hr/first"), r"outside \[0, 1\]"),
        (("--video", "pickle.npy", "--reference", "hr/first"), "not a readable .npy"),
        (("--video", "out", "--reference", "hr", "--metrics", "pnsr"), "did you mean 'psnr'"),
        (("--video", "out", "--metrics", "no_such_package.module:Metric"), "No module named 'no_such_package'"),
        (("--video", "out", "--metrics", "json:loads"), "not a subclass of Metric"),
        (("--video", "out", "--metrics", "json:Metric"), "has no Metric"),
    ],
)
def test_bad_input_is_one_clear_error_and_no_file(
    folders: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    (folders / "text.mp4").write_text("not a video")
    np.save(folders / "small.npy", np.zeros((2, 8, 8, 3), np.uint8))
    np.save(folders / "shape.npy", np.zeros((3, 3)))
    np.save(folders / "range.npy", np.full((2, 8, 8, 3), 200.0))
    np.save(folders / "pickle.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    monkeypatch.chdir(folders)
    with pytest.raises(UserError, match=message):
        run(monkeypatch, evaluate, *arguments, "--output", "metrics.json")
    assert not (folders / "metrics.json").exists()


def test_the_old_option_for_sets_is_refused_with_the_new_one(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="write --metrics weight-free"):
        run(monkeypatch, evaluate, "--video", folders / "out", "--output", "m.json", "--set", "weight-free")


def test_the_command_ends_with_status_two_and_one_line(tmp_path: Path) -> None:
    line = ("--video", "absent", "--output", tmp_path / "m.json", "--metrics", "niqe_fitted")
    done = commands.run("-m", "metrics.evaluate", *line, warm=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: niqe_fitted needs --niqe-model")


def test_two_clips_of_one_name_are_refused(folders: Path) -> None:
    np.save(folders / "hr/first.npy", np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="two clips named first"):
        find_clips(folders / "hr")


def test_names_of_sets_and_lists() -> None:
    assert resolve_names("weight-free") == ("gmsd", "niqe_fitted")
    assert resolve_names("psnr, ssim,psnr") == ("psnr", "ssim")
    with pytest.raises(UserError, match="no metric"):
        resolve_names(",")


def test_published_tables_name_our_metrics() -> None:
    published = load_published()
    assert published.tables[0].rows["DUO-VSR"]["niqe"] == 4.42
    columns = {name for table in published.tables for row in table.rows.values() for name in row}
    assert columns - set(METRICS) == {"seconds", "parameters_b"}

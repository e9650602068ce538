"""LPIPS against its formula on a random backbone, and what is said when weights or packages are missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from common.errors import UserError
from metrics.frame_metric import MetricSettings
from metrics.registry import SETS, create, create_all

ALEXNET = "alexnet-owt-7be5be79.pth"


@pytest.fixture
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any weight file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("DUO_VSR_WEIGHTS", raising=False)
    return tmp_path


def test_lpips_is_the_written_formula(tmp_path: Path, real_clip: Tensor) -> None:
    lpips = pytest.importorskip("lpips")
    from torchvision.models import alexnet

    torch.manual_seed(0)
    backbone = alexnet(weights=None).eval()
    torch.save(backbone.state_dict(), tmp_path / ALEXNET)
    heads = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).lins

    video, reference = real_clip[:1, :, :128, :128].flip(-1), real_clip[:1, :, :128, :128]
    mean = torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1)
    deviation = torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1)
    x, y = ((2 * frame - 1 - mean) / deviation for frame in (video, reference))
    expected, tap = 0.0, 0
    with torch.no_grad():
        for index, layer in enumerate(backbone.features):
            x, y = layer(x), layer(y)
            if index in (1, 4, 7, 9, 11):
                difference = functional.normalize(x, dim=1) - functional.normalize(y, dim=1)
                weight = heads[tap].model[-1].weight
                expected += (weight * difference.square()).sum(dim=1).mean().item()
                tap += 1
    metric = create("lpips", MetricSettings(weights=tmp_path))
    assert metric(video, reference) == pytest.approx(expected, rel=1e-4)
    assert metric(reference, reference) == 0
    together = create("lpips", MetricSettings(weights=tmp_path, frames_per_forward=2))
    assert together(video, reference) == pytest.approx(metric(video, reference), rel=1e-5)


def test_musiq_is_pyiqas_network_with_the_local_weights(tmp_path: Path, real_clip: Tensor) -> None:
    musiq = pytest.importorskip("pyiqa.archs.musiq_arch")
    torch.manual_seed(0)
    network = musiq.MUSIQ(pretrained=False).eval()
    torch.save(network.state_dict(), tmp_path / "musiq_koniq_ckpt-e95806b9.pth")
    metric = create("musiq", MetricSettings(weights=tmp_path))
    with torch.no_grad():
        expected = [network(frame[None]).item() for frame in real_clip[:2]]
    assert expected[0] != expected[1]
    assert metric(real_clip[:2]) == pytest.approx(sum(expected) / 2, rel=1e-5)
    together = create("musiq", MetricSettings(weights=tmp_path, frames_per_forward=2))
    assert together(real_clip[:2]) == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_another_networks_file_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("lpips")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / ALEXNET)
    with pytest.raises(UserError, match="not torchvision's AlexNet"):
        create("lpips", MetricSettings(weights=tmp_path))


def test_pickled_code_in_a_weight_file_is_not_run(tmp_path: Path) -> None:
    pytest.importorskip("lpips")

    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "trapped",))

    torch.save({"features.0.weight": Trap()}, tmp_path / ALEXNET)
    with pytest.raises(UserError, match="not a readable PyTorch weight file"):
        create("lpips", MetricSettings(weights=tmp_path))
    assert not (tmp_path / "trapped").exists()


def test_weights_come_from_the_folder_in_the_environment(no_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lpips")
    from torchvision.models import alexnet

    folder = no_weights / "mine"
    folder.mkdir()
    torch.save(alexnet(weights=None).state_dict(), folder / ALEXNET)
    monkeypatch.setenv("DUO_VSR_WEIGHTS", str(folder))
    assert create("lpips").name == "lpips"


def test_all_that_is_missing_is_said_at_once(no_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyiqa.archs.musiq_arch", None)
    with pytest.raises(UserError) as caught:
        create_all(SETS["paper"])
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        ALEXNET,
        "musiq needs the package pyiqa",
        "DOVER.pth",
        "onnx_dover.onnx",
        "weight-free (gmsd, niqe_fitted)",
    ):
        assert part in message

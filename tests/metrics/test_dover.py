"""DOVER's views, fusion and ONNX session, on a small graph with the authors' inputs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import UserError
from metrics.dover import Views, fragment_places, fragments, frame_indices, fuse
from metrics.frame_metric import ClipSize, MetricSettings
from metrics.registry import create


def test_fusion_weighs_technical_first() -> None:
    assert fuse(0.1107, -0.08285) == pytest.approx(50)
    assert fuse(0.1107 + 0.07355, -0.08285) == pytest.approx(100 / (1 + math.exp(-0.6104)))
    assert fuse(0.1107, -0.08285 + 0.03774) == pytest.approx(100 / (1 + math.exp(-0.3896)))


@pytest.mark.parametrize("frames", [5, 21, 70, 400])
def test_frames_come_from_their_own_stretch(frames: int) -> None:
    indices = frame_indices(frames, 3, 32, np.random.default_rng(0)).reshape(3, 32)
    assert ((indices >= 0) & (indices < frames)).all()
    assert (np.diff(indices, axis=1) % frames == 2 % frames).all()
    for stretch, start in enumerate(indices[:, 0]):
        assert stretch * (frames // 3) <= start < (stretch + 1) * (frames // 3)


def test_fragments_are_untouched_squares_of_their_cells() -> None:
    height, width = 300, 420
    ramp = torch.arange(height * width).reshape(height, width).float().expand(3, -1, -1)
    result = fragments(ramp, fragment_places(height, width, np.random.default_rng(0)))
    assert result.shape == (3, 224, 224)
    for row in range(7):
        for column in range(7):
            corner = int(result[0, 32 * row, 32 * column])
            top, left = divmod(corner, width)
            assert row * (height // 7) <= top <= (row + 1) * (height // 7) - 32
            assert column * (width // 7) <= left <= (column + 1) * (width // 7) - 32
            square = result[1, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
            assert torch.equal(square, ramp[1, top : top + 32, left : left + 32])


def test_views_have_the_sizes_the_network_was_trained_with(real_clip: Tensor) -> None:
    views = Views(ClipSize(len(real_clip), 100, 120), antialias=False)
    for frame in real_clip[..., :100, :120] * 255:  # below 224: enlarged
        views.add(frame)
    assert views.aesthetic.shape == (1, 3, 32, 224, 224)
    assert views.technical.shape == (3, 3, 32, 224, 224)
    assert np.ptp(views.aesthetic, axis=(1, 3, 4)).min() > 1, "every frame is filled"
    assert np.ptp(views.technical, axis=(1, 3, 4)).min() > 1


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A graph with the inputs of the authors' export, whose two heads are means of the views."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    kind, helper = onnx.TensorProto.FLOAT, onnx.helper
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["aes_view"], ["aesthetic"], axes=[1, 2, 3, 4], keepdims=0),
            helper.make_node("ReduceMean", ["tech_view"], ["technical"], axes=[1, 2, 3, 4], keepdims=0),
        ],
        "dover",
        [
            helper.make_tensor_value_info("aes_view", kind, [1, 3, 32, 224, 224]),
            helper.make_tensor_value_info("tech_view", kind, [4, 3, 32, 224, 224]),
        ],
        [helper.make_tensor_value_info("aesthetic", kind, [1]), helper.make_tensor_value_info("technical", kind, [4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, str(tmp_path / "onnx_dover.onnx"))
    return tmp_path


def test_score_of_a_known_network(exported: Path) -> None:
    grey = torch.full((6, 3, 240, 240), 0.5)
    mean, deviation = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    head = float(((127.5 - mean) / deviation).mean())
    metric = create("dover", MetricSettings(weights=exported))
    assert metric(grey) == pytest.approx(fuse(head, head), rel=1e-3)  # float32 sums


def test_equal_clips_get_equal_scores(exported: Path, real_clip: Tensor) -> None:
    metric = create("dover", MetricSettings(weights=exported))
    assert metric(real_clip) == metric(real_clip.clone())


def test_a_file_that_is_no_export_is_named(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "onnx_dover.onnx").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not DOVER's ONNX export"):
        create("dover", MetricSettings(weights=tmp_path))

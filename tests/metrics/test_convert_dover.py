"""DOVER's network against torchvision's, and its weights to ONNX and back; all weights are random."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models import convnext_tiny
from torchvision.models.video import swin3d_t

from common.errors import UserError
from common.fingerprint import file_sha256
from metrics.convert_dover import convert
from metrics.dover import Dover
from metrics.dover_network import AestheticBackbone, DoverNetwork, fragments_between


@pytest.fixture(scope="module")
def network() -> DoverNetwork:
    torch.manual_seed(0)
    return DoverNetwork().eval()


def published(network: DoverNetwork) -> dict[str, Tensor]:
    """Its weights by the names of DOVER.pth, as the authors' Video Swin gives them."""
    named = {}
    for name, tensor in network.state_dict().items():
        if name.startswith("technical_backbone.features."):
            _, _, stage, rest = name.split(".", 3)
            room = f"layers.{int(stage) // 2}.{'downsample.' if int(stage) % 2 else 'blocks.'}"
            name = f"technical_backbone.{room}{rest}".replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
        named[name] = tensor
    return named


def test_the_technical_view_is_video_swin_where_both_tables_agree(network: DoverNetwork) -> None:
    state, theirs = network.technical_backbone.state_dict(), swin3d_t(weights=None).eval()
    for name in list(state):
        if name.endswith("fragment_position_bias_table"):
            state[name] = state[name.replace("fragment_", "relative_")]
    ours = DoverNetwork().eval().technical_backbone
    ours.load_state_dict(state)
    plain = {name: tensor for name, tensor in state.items() if "fragment_" not in name}
    del theirs.head  # of a classifier, which DOVER has not
    theirs.load_state_dict(plain)
    clip = torch.randn(1, 3, 4, 224, 224)
    with torch.inference_mode():
        expected = theirs.norm(theirs.features(theirs.patch_embed(clip))).permute(0, 4, 1, 2, 3)
        assert torch.allclose(ours(clip), expected, atol=1e-5)
        changed = network.technical_backbone(clip)
    assert changed.shape == expected.shape == (1, 768, 2, 7, 7)
    assert not torch.allclose(changed, expected, atol=1e-3), "the tables matter"


def test_the_gate_counts_fragments_between_tokens() -> None:
    size, window, shift = (2, 14, 14), [2, 7, 7], [0, 3, 3]
    found = fragments_between(size, window, shift)
    assert found.shape == (4, 98, 98)
    for number, one, other in ((0, 0, 97), (1, 5, 60), (2, 13, 48), (3, 90, 7)):
        places = []
        for token in (one, other):
            row, column = (number // 2) * 7 + token // 7 % 7, (number % 2) * 7 + token % 7
            places.append(((row + 3) % 14 * 7 // 14, (column + 3) % 14 * 7 // 14))
        (a, b), (c, d) = places
        assert found[number, one, other] == abs(a - c) + abs(b - d)


def test_the_aesthetic_view_is_convnext_where_kernels_see_one_frame() -> None:
    torch.manual_seed(0)
    theirs = convnext_tiny(weights=None).eval()
    state, features = AestheticBackbone().state_dict(), theirs.features.state_dict()
    for block in (name for name in features if name.endswith("layer_scale")):
        features[block] = torch.rand_like(features[block])  # 1e-6 would hide what it scales
    theirs.features.load_state_dict(features)
    parts = {"block.0": "dwconv", "block.2": "norm", "block.3": "pwconv1", "block.5": "pwconv2", "layer_scale": "gamma"}
    for name, tensor in features.items():
        stage, rest = int(name.split(".")[0]), name.split(".", 1)[1]
        if stage % 2:
            found = re.match(r"(\d+)\.(block\.\d|layer_scale)(.*)", rest)
            assert found
            name = f"stages.{stage // 2}.{found[1]}.{parts[found[2]]}{found[3]}"
        else:
            name = f"downsample_layers.{stage // 2}.{rest}"
        shape = state[name].shape
        if tensor.ndim == 4:  # in the middle of the kernel, or at its start
            state[name] = torch.zeros(shape)
            state[name][:, :, shape[2] // 2 if shape[2] == 3 else 0] = tensor
        else:
            state[name] = tensor.reshape(shape)
    state["norm.weight"], state["norm.bias"] = torch.ones(768), torch.zeros(768)
    ours = AestheticBackbone().eval()
    ours.load_state_dict(state)
    clip = torch.randn(1, 3, 4, 224, 224)
    with torch.inference_mode():
        inside = theirs.features(clip[0, :, ::2].transpose(0, 1))
        expected = torch.nn.functional.layer_norm(inside.movedim(1, -1), (768,), eps=1e-6).permute(3, 0, 1, 2)
        assert torch.allclose(ours(clip)[0], expected, atol=1e-4)


def test_converted_weights_score_as_the_network_does(network: DoverNetwork, tmp_path: Path) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    torch.save(published(network), tmp_path / "DOVER.pth")
    digest = convert(tmp_path / "DOVER.pth", tmp_path / Dover.file, frames=2)
    assert digest == file_sha256(tmp_path / "DOVER.pth")
    held = onnx.load(str(tmp_path / Dover.file))
    assert {entry.key: entry.value for entry in held.metadata_props} == {"source_sha256": digest}
    session = runtime.InferenceSession(str(tmp_path / Dover.file), providers=["CPUExecutionProvider"])
    views = torch.randn(1, 3, 2, 224, 224), torch.randn(3, 3, 2, 224, 224)
    found = session.run(None, {"aes_view": views[0].numpy(), "tech_view": views[1].numpy()})
    with torch.inference_mode():
        for ours, theirs in zip(network(*views), found, strict=True):
            assert np.allclose(ours.numpy(), theirs, atol=1e-4)


def test_what_is_no_published_file_is_refused(network: DoverNetwork, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "trapped",))

    with pytest.raises(UserError, match=r"no file .*DOVER\.pth"):
        convert(tmp_path / "DOVER.pth", tmp_path / "out.onnx")
    torch.save({"technical_head.fc_last.weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match="not a readable PyTorch weight file"):
        convert(tmp_path / "trap.pth", tmp_path / "out.onnx")
    lacking = published(network)
    del lacking["aesthetic_head.fc_last.bias"]
    torch.save(lacking, tmp_path / "lacking.pth")
    with pytest.raises(UserError, match=r"does not hold DOVER's weights \(Missing key.*aesthetic_head.fc_last.bias"):
        convert(tmp_path / "lacking.pth", tmp_path / "out.onnx")
    assert not (tmp_path / "trapped").exists() and not (tmp_path / "out.onnx").exists()

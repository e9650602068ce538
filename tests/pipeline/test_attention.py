"""The attention switch: what is installed is used, what is missing is named."""

import importlib.util

import pytest
import torch

from common.errors import UserError
from pipeline.model.attention import BACKENDS, automatic_choice, set_attention, usable
from pipeline.model.transformer import VSRTransformer


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    return VSRTransformer(
        latent_channels=4, num_attention_heads=2, attention_head_dim=24, ffn_dim=64, freq_dim=32, text_dim=8,
        num_layers=1,
    ).eval()  # fmt: skip


def test_the_switch_reaches_every_attention_layer(transformer):
    chosen = set_attention(transformer, "native")
    attention = [module for name, module in transformer.named_modules() if name.endswith(("attn1", "attn2"))]
    assert chosen == "native" and len(attention) == 2
    assert {str(module.processor._attention_backend.value) for module in attention} == {"native"}


def test_native_attention_gives_the_numbers_of_the_default(transformer):
    z, prompt = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 3, 8)
    with torch.no_grad():
        before = transformer(z, torch.ones(1), z, prompt).velocity
        set_attention(transformer, "native")
        assert torch.equal(transformer(z, torch.ones(1), z, prompt).velocity, before)


@pytest.mark.parametrize("name", ["flash", "flash3", "xformers"])
def test_a_missing_package_is_named(transformer, name):
    package = BACKENDS[name][1]
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(UserError, match=f"needs the package {package}.*choose native"):
        set_attention(transformer, name)


def test_automatic_choice_works_here(transformer):
    assert set_attention(transformer, "auto") in BACKENDS
    if not torch.cuda.is_available():
        assert set_attention(transformer, "auto") == "native"


@pytest.mark.parametrize(
    ("capability", "installed", "expected"),
    [
        (9, ["flash_attn_interface", "flash_attn"], "flash3"),
        (9, ["flash_attn", "xformers"], "cudnn"),
        (8, ["flash_attn", "flash_attn_interface"], "flash"),
        (8, ["xformers"], "xformers"),
        (8, [], "native"),
    ],
)
def test_order_of_the_automatic_choice(monkeypatch, capability, installed, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert usable(half=True)[0] == expected
    line = automatic_choice(half=True)
    assert line.startswith(f"attention: {expected}")
    assert [name for name in BACKENDS if f"{name} needs" in line] == list(BACKENDS)[: list(BACKENDS).index(expected)]
    assert not {"flash", "flash3", "cudnn"} & set(usable(half=False))


def test_cudnn_without_a_gpu_is_refused(transformer):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="cudnn needs a GPU"):
        set_attention(transformer, "cudnn")

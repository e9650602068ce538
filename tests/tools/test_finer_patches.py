"""Smaller tokens from a trained model: the two projections, and what the commands around it read."""

import sys

import pytest
import torch

from common.errors import UserError
from pipeline.model.config import TransformerConfig
from pipeline.model.load_weights import load_transformer
from pipeline.model.transformer import VSRTransformer
from tools.finer_patches import finer, main

SHAPE = {
    "latent_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "ffn_dim": 32,
    "freq_dim": 16,
    "text_dim": 8,
    "num_layers": 2,
}


@pytest.fixture(scope="module")
def coarse() -> VSRTransformer:
    torch.manual_seed(0)
    return VSRTransformer(**SHAPE, patch_size=(1, 2, 2)).eval()


def test_tokens_of_a_constant_patch_equal_the_one_they_were(coarse):
    fine = finer(coarse)
    x = torch.randn(1, 8, 3, 2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)  # constant in 2 x 2
    tokens = coarse.patch_embedding(x)
    assert torch.allclose(fine.patch_embedding(x), tokens.repeat_interleave(2, 3).repeat_interleave(2, 4), atol=1e-6)


def test_a_patch_gets_the_mean_of_what_its_places_got(coarse):
    fine = finer(coarse)
    tokens = torch.randn(1, 12, 24)
    patches = coarse._unpatchify(coarse.proj_out(tokens), torch.Size((1, 4, 3, 4, 4)))
    mean = patches.unflatten(3, (2, 2)).unflatten(5, (2, 2)).mean((4, 6))
    single = fine._unpatchify(fine.proj_out(tokens), torch.Size((1, 4, 3, 2, 2)))
    assert torch.allclose(single, mean, atol=1e-6)


def test_the_blocks_are_untouched_and_the_result_is_read_as_initial_weights(coarse, tmp_path, monkeypatch):
    coarse.save_pretrained(tmp_path / "coarse")
    monkeypatch.setattr(sys, "argv", ["finer", "--model", f"{tmp_path}/coarse", "--output", f"{tmp_path}/fine"])
    main()
    fine = load_transformer(tmp_path / "fine", TransformerConfig(**SHAPE, patch_size=(1, 1, 1)))
    assert tuple(fine.config.patch_size) == (1, 1, 1)
    for name, value in coarse.blocks.state_dict().items():
        assert torch.equal(fine.blocks.state_dict()[name], value)


def test_single_places_cannot_become_finer(coarse):
    with pytest.raises(UserError, match="one row and one column already"):
        finer(finer(coarse))

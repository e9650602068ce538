"""The prompt cache: what it embeds, how much memory it takes, what a model folder gets of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.errors import UserError
from pipeline.model.config import DEFAULT_PROMPT
from pipeline.model.prompts import PromptCache, load_prompts
from tests.private_memory import private_kib


def test_round_trip_and_unknown_prompt(tmp_path: Path) -> None:
    cache = PromptCache.from_embeddings({"": torch.zeros(1, 3), "a b": torch.arange(6.0).reshape(2, 3)}, 4)
    cache.save_pretrained(tmp_path)
    cache = load_prompts(tmp_path)
    embedded = cache.embed(["a b", ""])
    assert embedded.shape == (2, 4, 3)
    assert torch.equal(embedded[0, :2].flatten(), torch.arange(6.0))
    assert not embedded[0, 2:].any() and not embedded[1].any()
    with pytest.raises(UserError, match=r"'c' is not in the prompt cache.*'', 'a b'"):
        cache.embed(["c"])


def test_the_weights_are_mapped_not_copied(tmp_path: Path) -> None:
    rows = torch.ones(16 * 2**20 // 1024, 1024)
    PromptCache.from_embeddings({"": rows}, len(rows)).save_pretrained(tmp_path)
    own_kib = private_kib()
    cache = load_prompts(tmp_path)
    assert cache.rows.sum() == rows.numel()
    assert private_kib() - own_kib < rows.nbytes / 1024 / 4


def test_a_damaged_cache_is_one_line(tmp_path: Path) -> None:
    PromptCache.from_embeddings({"": torch.zeros(1, 3)}, 4).save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(UserError, match=f"cannot load the prompt cache in {tmp_path}"):
        load_prompts(tmp_path)


def test_the_null_and_the_default_prompt_come_first() -> None:
    prompts = ["a", "b", DEFAULT_PROMPT, ""]
    cache = PromptCache.from_embeddings({p: torch.full((i + 1, 3), float(i)) for i, p in enumerate(prompts)}, 8)
    few = cache.first(3)
    assert few.config.prompts == ["", DEFAULT_PROMPT, "a"]
    assert torch.equal(few.embed(few.config.prompts), cache.embed(few.config.prompts))
    assert cache.first(9).config.prompts == ["", DEFAULT_PROMPT, "a", "b"]

"""Prompt embeddings: umT5's own numbers, unpadded, cached."""

import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from common.errors import UserError
from pipeline.model.prompts import DEFAULT_PROMPT, NULL_PROMPT, encode_prompts, load_prompts, main, placeholder_cache

WORDS = ["<pad>", "</s>", "<unk>", *DEFAULT_PROMPT.split(), "a", "cat"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A Wan folder in diffusers layout with a small random umT5 and a tokenizer of a few words."""
    folder = tmp_path_factory.mktemp("wan")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    return folder


def test_embeddings_are_those_of_a_padded_batch(encoder):
    """Wan pads to 512 with a mask and cuts what lies beyond; encoding without padding gives the same rows."""
    cache = encode_prompts(["a cat", ""], encoder, max_length=6)
    model = UMT5EncoderModel.from_pretrained(encoder / "text_encoder").eval()
    ids = torch.tensor([[WORDS.index("a"), WORDS.index("cat"), 1, 0, 0, 0]])
    with torch.no_grad():
        padded = model(ids, attention_mask=(ids != 0).long()).last_hidden_state
    embedded = cache.embed(["a cat"])
    assert torch.allclose(embedded[:, :3], padded[:, :3], atol=1e-5)
    assert not embedded[:, 3:].any()
    assert cache.config.lengths == [3, 1]


def test_command_adds_the_default_and_null_prompts(encoder, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a cat\n\na cat\n")
    output = tmp_path / "prompts"
    arguments = ["--encoder", encoder, "--prompts", tmp_path / "prompts.txt", "--output", output]
    monkeypatch.setattr(sys, "argv", ["text", *map(str, arguments)])
    main()
    cache = load_prompts(output)
    assert cache.config.prompts == [NULL_PROMPT, DEFAULT_PROMPT, "a cat"]
    assert cache.embed([DEFAULT_PROMPT, "a cat"]).shape == (2, 512, 16)


def test_placeholder_tells_conditioned_from_not(tmp_path):
    first, again = placeholder_cache(8, 4), placeholder_cache(8, 4)
    assert torch.equal(first.embed([DEFAULT_PROMPT]), again.embed([DEFAULT_PROMPT]))
    assert first.embed([DEFAULT_PROMPT]).any() and not first.embed([NULL_PROMPT]).any()


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_missing_folders_are_named(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"{name} has no tokenizer/"):
        encode_prompts([""], tmp_path / name)
    with pytest.raises(UserError, match=f"no prompt cache in .*{name}"):
        load_prompts(tmp_path / name)

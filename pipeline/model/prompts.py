"""Prompt embeddings, computed once and kept: at run time no text encoder is needed.

    python -m pipeline.model.prompts --encoder Wan2.1-T2V-1.3B-Diffusers --prompts prompts.txt --output prompts/

`--encoder` is a Wan folder in diffusers layout (`tokenizer/`, `text_encoder/`: umT5-xxl). The folder written is a
`PromptCache`: the `prompts` component of a model folder. A training set may have as many prompts as clips; its cache is
mapped into memory, so the ranks of a node share one copy, and a model folder gets a few of them.
"""

from __future__ import annotations

import argparse
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common.errors import UserError, run_command
from common.progress import progress
from common.seeding import seeded_noise
from pipeline.model.config import DEFAULT_PROMPT, NULL_PROMPT


class PromptCache(ModelMixin, ConfigMixin):
    """Embeddings of a fixed list of prompts, stored without padding.

    Args:
        prompts: the prompts, in the order of their rows; the null prompt "" must be among them.
        lengths: tokens of each.
        text_dim: width of an embedding (umT5-xxl: 4096).
        max_length: tokens that `embed` pads to with zeros (Wan: 512).
    """

    @register_to_config
    def __init__(self, prompts: list[str], lengths: list[int], text_dim: int, max_length: int) -> None:
        super().__init__()
        if NULL_PROMPT not in prompts:
            raise UserError('a prompt cache needs the null prompt ""')
        if len(set(prompts)) != len(prompts) or len(prompts) != len(lengths) or max(lengths) > max_length:
            raise UserError("a prompt cache needs different prompts, one length each, none above max_length")
        self.rows = nn.Parameter(torch.zeros(sum(lengths), text_dim), requires_grad=False)

    @classmethod
    def from_embeddings(cls, embeddings: dict[str, Tensor], max_length: int) -> PromptCache:
        """Build from one (tokens, text_dim) tensor per prompt."""
        lengths = [len(rows) for rows in embeddings.values()]
        width = next(iter(embeddings.values())).shape[1]
        cache = cls(list(embeddings), lengths, width, max_length)
        cache.rows.data.copy_(torch.cat(list(embeddings.values())))
        return cache

    def embed(self, captions: list[str]) -> Tensor:
        """(B, max_length, text_dim) float32, zero-padded.

        Raises:
            UserError: a caption that is not in the cache.
        """
        result = torch.zeros(len(captions), self.config.max_length, self.config.text_dim, device=self.rows.device)
        for index, caption in enumerate(captions):
            if caption not in self._spans:
                raise UserError(
                    f"prompt {caption!r} is not in the prompt cache; add it with python -m pipeline.model.prompts, "
                    f"or use one of {', '.join(map(repr, self.config.prompts[:5]))}"
                )
            rows = self.rows[self._spans[caption]]
            result[index, : len(rows)] = rows
        return result

    def first(self, count: int) -> PromptCache:
        """The null prompt, the default prompt if it is there, and others in their order: at most `count` in all."""
        prompts = dict.fromkeys([NULL_PROMPT, *(p for p in (DEFAULT_PROMPT, *self.config.prompts) if p in self._spans)])
        chosen = {prompt: self.rows[self._spans[prompt]] for prompt in list(prompts)[:count]}
        return self.from_embeddings(chosen, self.config.max_length)

    @cached_property
    def _spans(self) -> dict[str, slice]:
        """The rows of each prompt."""
        ends = list(accumulate(self.config.lengths))
        return {
            prompt: slice(end - length, end)
            for prompt, end, length in zip(self.config.prompts, ends, self.config.lengths, strict=True)
        }


def load_prompts(folder: str | Path) -> PromptCache:
    """Open a prompt cache folder.

    Raises:
        UserError: no such folder or missing weights.
    """
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"no prompt cache in {folder}; make one with python -m pipeline.model.prompts")
    with torch.device("meta"):
        cache = PromptCache.from_config(PromptCache.load_config(folder))
    weights = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    try:
        with safe_open(weights, framework="pt") as file:  # mapped: the pages are read when used, and shared
            cache.load_state_dict({"rows": file.get_tensor("rows")}, assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"cannot load the prompt cache in {folder}: {str(error).splitlines()[0]}") from None
    return cache.requires_grad_(False)


@torch.no_grad()
def encode_prompts(prompts: list[str], encoder: str | Path, device: str = "cpu", max_length: int = 512) -> PromptCache:
    """Embed with umT5 as Wan does: every token's last hidden state, nothing beyond the end of the text."""
    from transformers import AutoTokenizer, UMT5EncoderModel

    folder = Path(encoder)
    for part in ("tokenizer", "text_encoder"):
        if not (folder / part).is_dir():
            raise UserError(f"--encoder {folder} has no {part}/; give a Wan2.1 folder in diffusers layout")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    model = UMT5EncoderModel.from_pretrained(folder / "text_encoder", use_safetensors=True).to(device).eval()
    embeddings = {}
    with progress(len(prompts), "prompts", "prompt") as bar:
        for prompt in prompts:
            tokens = tokenizer(prompt, truncation=True, max_length=max_length, return_tensors="pt").to(device)
            embeddings[prompt] = model(**tokens).last_hidden_state[0].float().cpu()
            bar.advance()
    return PromptCache.from_embeddings(embeddings, max_length)


def placeholder_cache(text_dim: int, max_length: int) -> PromptCache:
    """A cache without a text encoder, for models trained from nothing: a fixed random vector for the default prompt and
    zeros for the null prompt. It says "conditioned" and "not conditioned", no more."""
    embedding = seeded_noise((max_length, text_dim), "placeholder prompt", DEFAULT_PROMPT)
    return PromptCache.from_embeddings({NULL_PROMPT: torch.zeros(1, text_dim), DEFAULT_PROMPT: embedding}, max_length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--encoder", type=Path, help="Wan2.1 folder in diffusers layout")
    source.add_argument("--placeholder", type=int, metavar="TEXT_DIM", help="no encoder: see placeholder_cache")
    parser.add_argument(
        "--prompts", type=Path, help="text file, one prompt a line; the default and null prompts are added"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max-length", type=int, default=None, help="tokens; 512 with --encoder, 4 with --placeholder")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.placeholder:
        cache = placeholder_cache(arguments.placeholder, arguments.max_length or 4)
    else:
        lines = arguments.prompts.read_text().splitlines() if arguments.prompts else []
        prompts = list(dict.fromkeys([NULL_PROMPT, DEFAULT_PROMPT, *(line.strip() for line in lines)]))
        cache = encode_prompts(prompts, arguments.encoder, arguments.device, arguments.max_length or 512)
    cache.save_pretrained(arguments.output)
    print(f"{len(cache.config.prompts)} prompts in {arguments.output}")


if __name__ == "__main__":
    run_command(main)

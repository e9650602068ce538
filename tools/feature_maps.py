"""What real and fake score see: PCA and t-SNE of the features that the discriminator taps (Figure 10 of the paper).

    python -m tools.feature_maps --model MODEL --real BASE --fake RUN/checkpoints/step-00001000 --data SHARDS \
        --output features.png [--clip 0] [--time 0.5]

Both networks get the same clip, diffused to the same time with the same noise. Features are those of layers 9, 18, 27
of 30 (the same shares of other depths), normalised per token as the discriminator's heads take them. For each layer one
PCA is fitted on the tokens of both, so that equal colours and equal places mean equal features:

    rows 1, 2   the first three components of each token of the middle frame, as red, green, blue
    row 3       all tokens of both on the first two components
    row 4       t-SNE of some tokens of both, where scikit-learn is installed
"""

from __future__ import annotations

import argparse
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.atomic import atomic_file
from common.command_line import add_config_options, load_sections
from common.errors import UserError, run_command
from common.seeding import seeded_noise
from common.storage import StorageConfig
from datagen.dataset.dataset import ShardDataset
from pipeline.flow_matching import q_t
from pipeline.model.load_weights import load_transformer, saved_config
from pipeline.model.prompts import DEFAULT_PROMPT
from pipeline.model.transformer import VSRTransformer, tapped_layers
from pipeline.vsr_pipeline import open_pipeline
from trainer.engine.zero_shards import Fragment, load_fragments
from trainer.stages.losses import per_token_norm

#: tokens of each network that t-SNE places, and its perplexity [ours; scikit-learn's default]
_TOKENS, _PERPLEXITY = 1000, 30
_COLOURS = {"real score": "#2f6fde", "fake score": "#d9822b"}

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Layer:
    """One tapped layer.

    Attributes:
        number: 1-based.
        components: network -> (tokens, 3), the first three principal components.
        explained: share of the variance of each of them.
        embedded: network -> (some tokens, 2) of t-SNE; None without scikit-learn.
    """

    number: int
    components: dict[str, Array]
    explained: Array
    embedded: dict[str, Array] | None


def load_fake_score(path: Path, like: VSRTransformer) -> VSRTransformer:
    """The fake score of a model folder, or of a checkpoint of the stage dual_stream, whatever wrote it.

    Args:
        like: a network of its shape; its weights are overwritten.

    Raises:
        UserError: neither there, or of another shape.
    """
    if (path / "transformer").is_dir():
        return load_transformer(path, saved_config(path))
    if not (path / "critic").is_dir():
        raise UserError(f"{path} is no model folder (transformer/) and no checkpoint of dual_stream (critic/)")
    parameters = list(like.named_parameters())
    flat = [torch.zeros(parameter.numel()) for _, parameter in parameters]
    fragments = [
        Fragment(f"transformer.{name}", 0, parameter.numel(), values, 0)
        for (name, parameter), values in zip(parameters, flat, strict=True)
    ]
    load_fragments(path / "critic", fragments, {"master": flat})
    with torch.no_grad():
        for (_, parameter), values in zip(parameters, flat, strict=True):
            parameter.copy_(values.view_as(parameter))
    return like


@torch.inference_mode()
def tapped_features(
    model: VSRTransformer, z_t: Tensor, time: float, z_lr: Tensor, prompt: Tensor, layers: tuple[int, ...]
) -> list[Array]:
    """(tokens, D) for each layer, normalised per token; latents are (1, C, T, h, w)."""
    features = model(z_t, torch.tensor([time], device=z_t.device), z_lr, prompt, layers, features_only=True).features
    return [per_token_norm(feature.float())[0].cpu().double().numpy() for feature in features]


def principal_components(tokens: Array, count: int = 3) -> tuple[Array, Array]:
    """(N, D) -> (N, count) in the order of their variance, and each one's share of the whole."""
    centred = tokens - tokens.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    order = np.argsort(values)[::-1][:count]
    return centred @ vectors[:, order], values[order] / values.sum()


def reduce(number: int, features: dict[str, Array]) -> Layer:
    """PCA, and t-SNE where there is one, fitted on the tokens of both networks together."""
    names = list(features)
    components, explained = principal_components(np.concatenate([features[name] for name in names]))
    split = np.split(components, np.cumsum([len(features[name]) for name in names])[:-1])
    return Layer(number, dict(zip(names, split, strict=True)), explained, _embed(features))


def _embed(features: dict[str, Array]) -> dict[str, Array] | None:
    try:
        manifold: Any = importlib.import_module("sklearn.manifold")
    except ImportError:
        return None
    rng = np.random.default_rng(0)
    some = [rng.permutation(values)[:_TOKENS] for values in features.values()]
    tokens = np.concatenate(some)
    placed = manifold.TSNE(perplexity=min(_PERPLEXITY, (len(tokens) - 1) / 3), random_state=0).fit_transform(tokens)
    return dict(zip(features, np.split(placed, np.cumsum([len(part) for part in some])[:-1]), strict=True))


def draw(layers: list[Layer], grid: tuple[int, int, int], title: str) -> matplotlib.figure.Figure:
    """The figure; `grid` is (T', H', W') of the tokens."""
    with_tsne = all(layer.embedded is not None for layer in layers)
    rows = 4 if with_tsne else 3
    figure = matplotlib.figure.Figure(figsize=(4 * len(layers), 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, len(layers), squeeze=False)
    figure.suptitle(title)
    for column, layer in zip(axes.T, layers, strict=True):
        every = np.concatenate(list(layer.components.values()))
        low, high = np.quantile(every, 0.01, axis=0), np.quantile(every, 0.99, axis=0)
        for axis, (name, components) in zip(column[:2], layer.components.items(), strict=True):
            colours = np.clip((components - low) / np.maximum(high - low, 1e-12), 0, 1)
            axis.imshow(colours.reshape(*grid, 3)[grid[0] // 2], interpolation="nearest")
            axis.set(title=f"{name}, layer {layer.number}", xticks=[], yticks=[])
        shares = " + ".join(f"{100 * share:.0f}" for share in layer.explained)
        _scatter(column[2], layer.components, f"PCA; components hold {shares} %")
        if layer.embedded is not None and with_tsne:
            _scatter(column[3], layer.embedded, "t-SNE")
    axes[2, 0].legend(markerscale=4)
    return figure


def _scatter(axis: Any, points: dict[str, Array], title: str) -> None:
    for name, values in points.items():
        axis.scatter(values[:, 0], values[:, 1], s=2, alpha=0.5, color=_COLOURS[name], label=name)
    axis.set(title=title, xticks=[], yticks=[])


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw tapped features of real and fake score.")
    add_config_options(parser, required=False)
    parser.add_argument("--model", type=Path, required=True, help="model folder, for its prompts")
    parser.add_argument("--real", type=Path, required=True, help="model folder of the real score: the base model")
    parser.add_argument("--fake", type=Path, required=True, help="checkpoint of dual_stream, or a model folder")
    parser.add_argument("--data", required=True, help="dataset of datagen.build_shards")
    parser.add_argument("--clip", type=int, default=0, help="its position in the dataset")
    parser.add_argument("--time", type=float, default=0.5, help="of flow matching, 0 clean, 1 noise")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True, help="an image: .png, .pdf, .svg")
    arguments = parser.parse_args()
    if not 0 <= arguments.time <= 1:
        raise UserError(f"--time {arguments.time}: it must be in [0, 1]")
    (storage,) = load_sections(arguments, storage=StorageConfig)
    dataset, _ = ShardDataset.open(arguments.data, storage, kind="clips")
    if not 0 <= arguments.clip < len(dataset):
        raise UserError(f"--clip {arguments.clip}: the dataset has {len(dataset)}, numbered from 0")
    sample = dataset[arguments.clip]
    latents = {name: value[None].float().to(arguments.device) for name, value in sample.tensors("latents").items()}
    prompts = open_pipeline(arguments.model).prompts
    prompt = prompts.embed([sample.metadata().get("caption", DEFAULT_PROMPT)]).to(arguments.device)
    noise = seeded_noise(latents["z_hr"].shape, "feature maps", sample.key).to(arguments.device)
    z_t = q_t(latents["z_hr"], noise, torch.tensor([arguments.time], device=arguments.device))

    real = load_transformer(arguments.real, saved_config(arguments.real))
    numbers = tapped_layers(real.config.num_layers)
    inputs = (z_t, arguments.time, latents["z_lr"], prompt, numbers)
    grid = tuple(int(side) // patch for side, patch in zip(z_t.shape[2:], real.config.patch_size, strict=True))
    features = {"real score": tapped_features(real.to(arguments.device), *inputs)}
    fake = load_fake_score(arguments.fake, real)
    features["fake score"] = tapped_features(fake.to(arguments.device), *inputs)
    by_layer = [dict(zip(features, both, strict=True)) for both in zip(*features.values(), strict=True)]
    layers = [reduce(number, both) for number, both in zip(numbers, by_layer, strict=True)]

    figure = draw(layers, grid, f"clip {sample.key}, t = {arguments.time:g}")  # type: ignore[arg-type]
    with atomic_file(arguments.output) as temporary:
        figure.savefig(temporary, dpi=150)
    print(arguments.output)
    if layers[0].embedded is None:
        print("without t-SNE: scikit-learn cannot be imported (pip install scikit-learn)")


if __name__ == "__main__":
    run_command(main)

"""Memory of Stage II: what the passes of its two updates hold at most (formulas: trainer/planning/memory.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.planning.memory import ActivationSizes
    from trainer.stages.dual_stream.config import DualStreamConfig


def activation_bytes(sizes: ActivationSizes, config: DualStreamConfig) -> float:
    """The larger of the auxiliary and the student update."""
    return max(auxiliary_update(sizes, config), student_update(sizes, config))


def auxiliary_update(sizes: ActivationSizes, config: DualStreamConfig) -> float:
    """Features of the real score, then fake score and heads."""
    taps = len(_taps(sizes, config))
    perturbed = bool(config.r1_weight) + bool(config.r2_weight)
    features = sizes.feature() * taps * ((3 if config.tapped == "both" else 2) + perturbed * _tapped_models(config))
    graph = sizes.graph(sizes.layers, trained=True) + features + sizes.ends()
    heads = (2 + perturbed) * taps * _head(sizes, config, trained=True) + _head_work(sizes, config)
    return graph + max(sizes.work(trained=True), heads)


def student_update(sizes: ActivationSizes, config: DualStreamConfig) -> float:
    """The student's graph stays while both score models' graphs are built, walked and freed."""
    student = sizes.graph(sizes.layers, trained=True) + sizes.ends()
    if not config.gan:
        return student + sizes.work(trained=True)
    taps, models = _taps(sizes, config), _tapped_models(config)
    scores = sizes.ends()
    if config.tapped != "fake":
        scores += sizes.graph(taps[-1], trained=False)
    if config.tapped != "real":
        scores += sizes.graph(sizes.layers if config.dmd_weight else taps[-1], trained=False)
    scores += sizes.feature() * len(taps) * models  # of HR
    logits = len(taps) * _head(sizes, config, trained=False)
    matched = len(taps) * models * sizes.tokens * 4 * sizes.dim
    heads = logits + max(matched, _head_work(sizes, config))
    return student + max(scores + max(heads, sizes.work(trained=False)), sizes.work(trained=True))


def _taps(sizes: ActivationSizes, config: DualStreamConfig) -> tuple[int, ...]:
    from pipeline.model.transformer import tapped_layers

    return tapped_layers(sizes.layers, config.tap_fractions) if config.gan else ()


def _tapped_models(config: DualStreamConfig) -> int:
    return 2 if config.tapped == "both" else 1


def _head(sizes: ActivationSizes, config: DualStreamConfig, *, trained: bool) -> float:
    """What one head holds of one latent: its normed input, and its hidden layers around each activation."""
    channels = _tapped_models(config) * sizes.dim
    hidden = config.head.hidden_channels * (config.head.layers + 1) * sizes.width
    return sizes.tokens * (channels * sizes.width + 2 * hidden if trained else channels * 4 + hidden)


def _head_work(sizes: ActivationSizes, config: DualStreamConfig) -> float:
    """Inputs of one head in float32: normed, concatenated, transposed."""
    return sizes.tokens * 4 * 3 * _tapped_models(config) * sizes.dim

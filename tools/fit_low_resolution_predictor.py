"""Fit a DiT's prediction of z_HR from z_LR on latents of a dataset: its filter by least squares, its blocks by Adam.

    python -m tools.fit_low_resolution_predictor --config CONFIG --data SHARDS --output FOLDER [--model FOLDER]
        [--steps 5000] [--pixel-weight 0]

Over all places, z_HR - z_LR = W·(3 x 3 neighbours of z_LR) + b has a closed solution. The residual blocks, if the model
has any, then learn with the filter to lower the mean square of what is left. The deviation of that by channel is the
predictor's σ. With `--pixel-weight` λ they also lower λ·(mean‖D(ẑ) - x‖² + λ_∇·L_∇), x the HR clip in [-1, 1]: the
mean of latents need not decode to the mean of the clips, and a flat place of the latent not to a flat one.

The DiT is that of the configuration with random blocks, or with those of `--model`, which need not have a predictor;
the output projection is then zero: the network begins at the prediction. If they have one with the same blocks, it is
trained further and nothing else changes. The output is what `model.initial_weights` reads.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common.command_line import add_config_options, load_sections
from common.errors import UserError, run_command
from common.progress import progress
from datagen.dataset.loader import ShardReader
from pipeline.model.config import ModelConfig
from pipeline.model.load_weights import build_transformer, load_transformer, require_same_shapes, saved_config
from pipeline.model.low_resolution_skip import LowResolutionPredictor
from pipeline.model.transformer import VSRTransformer
from pipeline.model.vae import SPATIAL_FACTOR, VAE, decode_with_gradient, load_vae, to_pixels
from trainer.stages.losses import multiscale_gradient_loss

#: added to the diagonal of the normal equations, as a share of its mean
RIDGE = 1e-4
#: λ_∇ and sizes of L_∇ [ours]
GRADIENT_WEIGHT, GRADIENT_SCALES = 0.1, 2
#: latent places along a side of what the pixel loss compares: decoding is most of a step
WINDOW = 8
#: samples per batch of the reader
BATCH = 8
#: samples that the σ of a predictor with blocks is measured on
DEVIATION_SAMPLES = 160


def fit(predictor: LowResolutionPredictor, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Set filter and deviations by least squares.

    Args:
        batches: z_LR and z_HR, float (B, C, T, H, W).

    Returns:
        Mean square of the residual as a share of that of z_HR - z_LR.
    """
    channels = predictor.filter.in_channels
    size = 9 * channels + 1
    normal, right = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, channels, dtype=torch.float64)
    squares, count = torch.zeros(channels, dtype=torch.float64), 0
    for z_lr, z_hr in batches:
        x, y = neighbours(z_lr.float()), _rows((z_hr - z_lr).float())
        normal += (x.T @ x).double()
        right += (x.T @ y).double()
        squares += y.square().sum(0).double()
        count += len(y)
    ridge = RIDGE * normal.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    solution = torch.linalg.solve(normal + ridge, right)
    residual = (squares - (solution * (2 * right - normal @ solution)).sum(0)).clamp_min(0) / count
    with torch.no_grad():
        predictor.filter.weight.copy_(solution[:-1].T.reshape(channels, channels, 3, 3))
        predictor.filter.bias.copy_(solution[-1])
        predictor.log_deviation.copy_(0.5 * residual.clamp_min(1e-6).log())
    return float(residual.sum() * count / squares.sum())


class PixelLoss(NamedTuple):
    """λ·(mean‖D(ẑ) - x‖² + λ_∇·L_∇(D(ẑ), x)); L_∇ sees a faint pattern on a flat place, the squares do not."""

    vae: VAE
    weight: float
    gradient_weight: float = GRADIENT_WEIGHT

    def __call__(self, predicted: Tensor, hr: Tensor, corner: tuple[int, int] | None = None) -> Tensor:
        """
        Args:
            predicted: ẑ (B, C, T, H, W), normalised.
            hr: x, uint8 (B, F, H, W, 3).
            corner: first row and column, in latent places, of the window of `WINDOW` + 2 places that is decoded; its
                border is not compared. None: the whole.
        """
        edge = 0
        if corner is not None:
            (y, x), px = corner, SPATIAL_FACTOR
            predicted = predicted[..., y : y + WINDOW + 2, x : x + WINDOW + 2]
            hr = hr[:, :, px * y : px * (y + WINDOW + 2), px * x : px * (x + WINDOW + 2)]
            edge = px
        pixels = torch.stack([to_pixels(clip) for clip in hr])
        decoded = decode_with_gradient(self.vae, predicted)
        if edge:
            pixels, decoded = (side[..., edge:-edge, edge:-edge] for side in (pixels, decoded))
        loss_gradient = multiscale_gradient_loss(decoded, pixels, GRADIENT_SCALES)
        return self.weight * ((decoded - pixels).square().mean() + self.gradient_weight * loss_gradient)

    def random_corner(self, predicted: Tensor) -> tuple[int, int] | None:
        """By torch's generator; None where a clip is no larger than a window."""
        rooms = [side - WINDOW - 2 for side in predicted.shape[3:]]
        if min(rooms) <= 0:
            return None
        row, column = (int(torch.randint(room + 1, ())) for room in rooms)
        return row, column


def train(
    predictor: LowResolutionPredictor,
    batches: Iterator[tuple[Tensor, ...]],
    steps: int,
    rate: float,
    pixel_loss: PixelLoss | None = None,
) -> float:
    """Train filter and blocks on the mean square of prediction - z_HR, by Adam, the rate falling to 0 as a cosine.

    Args:
        batches: z_LR and z_HR, float (B, C, T, H, W), and the HR clip for `pixel_loss`; at least `steps` of them and
            those that σ is measured on.

    Returns:
        Mean square of the residual after training as a share of that of z_HR - z_LR, on the batches that follow.
    """
    optimizer = torch.optim.Adam(predictor.parameters(), lr=rate, betas=(0.9, 0.99))
    predictor.to(memory_format=torch.channels_last)  # twice the speed on CPUs
    with progress(steps, "training", "steps") as bar:
        for step, (z_lr, z_hr, *hr) in enumerate(islice(batches, steps)):
            optimizer.param_groups[0]["lr"] = (
                rate * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
            )
            predicted = predictor(z_lr)[0]
            loss_latent = loss = (predicted - z_hr).square().mean()
            said = ""
            if pixel_loss is not None:
                loss_pixels = pixel_loss(predicted, hr[0], pixel_loss.random_corner(predicted))
                loss = loss + loss_pixels
                said = f", pixels {loss_pixels.item() / pixel_loss.weight:.5f}"
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.advance(mean_square=f"{loss_latent.item():.4f}{said}")
    residual, before, count = torch.zeros(predictor.filter.in_channels, dtype=torch.float64), 0.0, 0
    with torch.no_grad():
        for z_lr, z_hr, *_ in islice(batches, DEVIATION_SAMPLES // BATCH):
            rows = _rows(predictor(z_lr)[0] - z_hr).double()
            residual += rows.square().sum(0)
            before += float((z_hr - z_lr).double().square().sum())
            count += len(rows)
        predictor.log_deviation.copy_(0.5 * (residual / count).clamp_min(1e-6).log())
    predictor.to(memory_format=torch.contiguous_format)
    return float(residual.sum()) / before


def _counted(batches: Iterator[tuple[Tensor, ...]], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    with progress(count, "least squares", "batches") as bar:
        for z_lr, z_hr, *_ in islice(batches, count):
            bar.advance()
            yield z_lr, z_hr


def neighbours(z: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B·T·H·W, 9C + 1): each place's 3 x 3 neighbours in the order of a filter's weights, and 1."""
    padded = torch.nn.functional.pad(z, (1, 1, 1, 1, 0, 0), mode="replicate")
    height, width = z.shape[3:]
    shifted = [padded[..., row : row + height, column : column + width] for row in range(3) for column in range(3)]
    rows = torch.stack(shifted, 2).permute(0, 3, 4, 5, 1, 2).flatten(0, 3).flatten(1)
    return torch.cat([rows, torch.ones(len(rows), 1)], 1)


def _rows(z: Tensor) -> Tensor:
    return z.permute(0, 2, 3, 4, 1).flatten(0, 3)


def take_over(model: VSRTransformer, folder: Path) -> bool:
    """Take over the weights of a trained model, without predictor and output projection if its predictor is another.

    Returns:
        Whether the predictor was taken over.

    Raises:
        UserError: the other weights have other shapes.
    """
    config = saved_config(folder)
    trained = load_transformer(folder, config).state_dict()
    ours, theirs = (
        {n: p.shape for n, p in s.items() if n.startswith("predictor.")} for s in (model.state_dict(), trained)
    )
    if ours == theirs and config.residual_input == model.config.residual_input:
        require_same_shapes(folder, trained, model)
        model.load_state_dict(trained)
        return True
    kept = ("proj_out", "predictor")
    state = {name: value for name, value in trained.items() if not name.startswith(kept)}
    state |= {name: value for name, value in model.state_dict().items() if name.startswith(kept)}
    require_same_shapes(folder, state, model)
    model.load_state_dict(state)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_config_options(parser)
    parser.add_argument("--data", required=True, help="dataset folder")
    parser.add_argument("--model", type=Path, help="folder of a trained DiT of the same width and patch")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=640, help="of the least squares")
    parser.add_argument("--steps", type=int, default=5000, help=f"of the blocks' training, {BATCH} samples each")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the blocks' training")
    parser.add_argument("--pixel-weight", type=float, default=0.0, help="λ; needs shards with stored clips")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    (config,) = load_sections(arguments, model=ModelConfig)
    if not config.transformer.low_resolution_predictor:
        raise UserError(
            f"{arguments.config}: model.transformer.low_resolution_predictor is false; add "
            "--set model.transformer.low_resolution_predictor=true"
        )
    torch.manual_seed(arguments.seed)
    model = build_transformer(config.transformer)
    further = arguments.model is not None and take_over(model, arguments.model)
    blocks = config.transformer.predictor_blocks
    pixel_loss = None
    if arguments.pixel_weight:
        pixel_loss = PixelLoss(load_vae(config.vae), arguments.pixel_weight)
    members = ("latents", "hr") if pixel_loss else ("latents",)
    reader = ShardReader(arguments.data, members=members, seed=arguments.seed, global_batch_size=BATCH)
    batches = (
        (batch.tensors["z_lr"].float(), batch.tensors["z_hr"].float(), *([batch.tensors["hr"]] if pixel_loss else []))
        for batch in reader
    )
    if not (further and blocks):
        left = fit(model.predictor, _counted(batches, -(-arguments.samples // BATCH)))
    if blocks:
        left = train(model.predictor, batches, arguments.steps, arguments.learning_rate, pixel_loss)
    model.save_pretrained(arguments.output)
    print(f"{arguments.output}: {left:.1%} of the square of z_HR - z_LR is left")


if __name__ == "__main__":
    run_command(main)

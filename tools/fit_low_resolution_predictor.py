"""Fit a DiT's linear prediction of z_HR from z_LR by least squares, on the latents of a dataset.

    python -m tools.fit_low_resolution_predictor --config CONFIG --data SHARDS --output FOLDER [--model FOLDER]

Over all places, z_HR - z_LR = W·(3 x 3 neighbours of z_LR) + b has a closed solution, and the deviation of its residual
by channel is the predictor's σ. The DiT is that of the configuration with random blocks, or with those of `--model`,
which need not have a predictor. Its output projection is zero: the network begins at the prediction. The output is what
`model.initial_weights` reads.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from common.command_line import add_config_options, load_sections
from common.errors import UserError, run_command
from common.progress import progress
from datagen.dataset.loader import ShardReader
from pipeline.model.config import ModelConfig
from pipeline.model.load_weights import build_transformer, load_transformer, require_same_shapes, saved_config
from pipeline.model.transformer import LowResolutionPredictor, VSRTransformer

#: added to the diagonal of the normal equations, as a share of its mean
RIDGE = 1e-4
#: samples per batch of the reader
BATCH = 8


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
        predictor.filter.weight.copy_(solution[:-1].T.reshape(channels, channels, 1, 3, 3))
        predictor.filter.bias.copy_(solution[-1])
        predictor.log_deviation.copy_(0.5 * residual.clamp_min(1e-6).log())
    return float(residual.sum() * count / squares.sum())


def neighbours(z: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B·T·H·W, 9C + 1): each place's 3 x 3 neighbours in the order of a filter's weights, and 1."""
    padded = torch.nn.functional.pad(z, (1, 1, 1, 1, 0, 0), mode="replicate")
    height, width = z.shape[3:]
    shifted = [padded[..., row : row + height, column : column + width] for row in range(3) for column in range(3)]
    rows = torch.stack(shifted, 2).permute(0, 3, 4, 5, 1, 2).flatten(0, 3).flatten(1)
    return torch.cat([rows, torch.ones(len(rows), 1)], 1)


def _rows(z: Tensor) -> Tensor:
    return z.permute(0, 2, 3, 4, 1).flatten(0, 3)


def with_blocks_of(model: VSRTransformer, folder: Path) -> None:
    """Take over everything but the predictor and the output projection from a trained model.

    Raises:
        UserError: it has other shapes.
    """
    trained = load_transformer(folder, saved_config(folder)).state_dict()
    kept = ("proj_out", "predictor")
    state = {name: value for name, value in trained.items() if not name.startswith(kept)}
    state |= {name: value for name, value in model.state_dict().items() if name.startswith(kept)}
    require_same_shapes(folder, state, model)
    model.load_state_dict(state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_config_options(parser)
    parser.add_argument("--data", required=True, help="dataset folder")
    parser.add_argument("--model", type=Path, help="folder of a trained DiT of the same width and patch")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=640)
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
    if arguments.model is not None:
        with_blocks_of(model, arguments.model)
    reader = ShardReader(arguments.data, seed=arguments.seed, global_batch_size=BATCH)
    count = -(-arguments.samples // BATCH)
    with progress(count, "fit", "batches") as bar:

        def batches() -> Iterable[tuple[Tensor, Tensor]]:
            for batch in islice(reader, count):
                bar.advance()
                yield batch.tensors["z_lr"].float(), batch.tensors["z_hr"].float()

        left = fit(model.predictor, batches())
    model.save_pretrained(arguments.output)
    print(f"{arguments.output}: {left:.1%} of the square of z_HR - z_LR is left")


if __name__ == "__main__":
    run_command(main)

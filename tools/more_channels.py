"""Give a trained small model the channels that its VAE has got: the same blocks, wider at both ends.

    python -m tools.more_channels --model FOLDER --channels 64 --output FOLDER
    python -m tools.more_channels --fast-decoder FOLDER --vae VAE --output FOLDER

For a VAE of `tools.initialise_small_vae --extend`: its first channels are those that were there. A DiT goes on as it
did on them; of the new ones it predicts what its skip says, and its predictor z_LR, until
`tools.fit_low_resolution_predictor --model` and further training. A fast decoder takes the linear path of the VAE's
decoder for them. The outputs are what `model.initial_weights`, and a model folder's `fast_decoder/`, are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError, run_command
from pipeline.model.config import TransformerConfig
from pipeline.model.fast_codec import FastDecoder
from pipeline.model.load_weights import load_transformer, saved_config
from pipeline.model.small_vae import SmallVideoVAE
from pipeline.model.transformer import VSRTransformer
from pipeline.model.vae import load_vae

#: weights with channels among their inputs, and how many clips of them stand one after the other: z_t and z_LR
INPUTS = {"patch_embedding.weight": 2, "predictor.filter.weight": 1, "predictor.enter.weight": 1}
#: and among their outputs; the DiT's are ordered frame, row, column, channel
OUTPUTS = ("proj_out.weight", "proj_out.bias")
PREDICTED = ("predictor.filter.weight", "predictor.filter.bias", "predictor.leave.weight", "predictor.leave.bias")


def with_channels(model: VSRTransformer, channels: int) -> VSRTransformer:
    """A DiT of `channels` latent channels, float32, that does on the first ones what `model` does.

    Raises:
        UserError: `channels` are no more than it has.
    """
    have = model.config.latent_channels
    _require_more(have, channels)
    settings = {name: value for name, value in model.config.items() if name in TransformerConfig.model_fields}
    result = VSRTransformer(**{**settings, "latent_channels": channels})
    state = {}
    for name, value in model.state_dict().items():
        if name in INPUTS:
            value = _padded(value.unflatten(1, (INPUTS[name], have)), 2, channels).flatten(1, 2)
        if name in OUTPUTS:
            value = _padded(value.unflatten(0, (-1, have)), 1, channels).flatten(0, 1)
        if name in PREDICTED:
            value = _padded(value, 0, channels)
        if name == "predictor.log_deviation":
            value = torch.cat([value, value.mean().expand(channels - have)])
        state[name] = value
    result.load_state_dict(state)
    return result


def decoder_with_channels(decoder: FastDecoder, vae: SmallVideoVAE) -> FastDecoder:
    """A fast decoder of the channels of `vae`, float32, that does on the first ones what `decoder` does.

    Raises:
        UserError: they are no more than it has.
    """
    have, channels = decoder.config.z_dim, vae.config.z_dim
    _require_more(have, channels)
    scales = {name: vae.config[name] for name in ("latents_mean", "latents_std")}
    result = FastDecoder.from_config(decoder.config, z_dim=channels, **scales)
    state = {name: value.float() for name, value in decoder.state_dict().items()}
    linear = vae.linear_decode.weight.detach().clone()
    linear[:have] = state["linear.weight"]
    state["linear.weight"] = linear
    latents, low_resolution = state["trunk.stem.weight"].tensor_split([2 * have], dim=1)
    latents = _padded(latents.unflatten(1, (2, have)), 2, channels).flatten(1, 2)
    state["trunk.stem.weight"] = torch.cat([latents, low_resolution], dim=1)
    result.load_state_dict(state)
    return result


def _padded(value: Tensor, dim: int, length: int) -> Tensor:
    """`value` with zeros behind it along `dim`."""
    shape = list(value.shape)
    shape[dim] = length - shape[dim]
    return torch.cat([value, value.new_zeros(shape)], dim=dim)


def _require_more(have: int, channels: int) -> None:
    if channels <= have:
        raise UserError(f"{channels} channels: the model has {have} already")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, help="folder of a DiT of ours, with its config.json")
    what.add_argument("--fast-decoder", type=Path, help="folder of a fast decoder")
    parser.add_argument("--channels", type=int, default=64, help="latent channels that the DiT gets")
    parser.add_argument("--vae", type=Path, help="folder of the extended VAE, for the fast decoder")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.model is not None:
        model = load_transformer(arguments.model, saved_config(arguments.model))
        with_channels(model, arguments.channels).save_pretrained(arguments.output)
        return
    vae = load_vae(arguments.vae) if arguments.vae is not None else None
    if not isinstance(vae, SmallVideoVAE):
        raise UserError("--fast-decoder: give the folder of an extended SmallVideoVAE as --vae")
    decoder_with_channels(FastDecoder.from_pretrained(arguments.fast_decoder), vae).save_pretrained(arguments.output)


if __name__ == "__main__":
    run_command(main)

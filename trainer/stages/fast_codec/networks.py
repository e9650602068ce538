"""The networks of the fast codec's stages: where their first weights come from, and those that only judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from common.errors import UserError
from pipeline.model.config import ModelConfig
from pipeline.model.fast_codec import FastDecoder, LowResolutionEncoder
from pipeline.model.load_weights import load_transformer, saved_config
from pipeline.model.small_vae import SmallVideoVAE
from pipeline.model.vae import VAE, decode_latents, load_vae, vae_class
from trainer.export import add_components
from trainer.stages.dual_stream.auxiliary_networks import Head
from trainer.stages.dual_stream.config import HeadConfig
from trainer.stages.fast_codec.config import FastDecoderConfig, LrEncoderConfig
from trainer.stages.stage import Trained

#: pixels along a side of what the discriminator takes as one position
PATCH_PX = 4
#: what the discriminator sees has a deviation of about its inverse [ours]
GAIN = 8.0


class FullDecoder(nn.Module):
    """The VAE's decoder as a network that is called: normalised latents to pixels, without a gradient."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, T, h, w) to (B, 3, 4T - 3, 8h, 8w), float32 in [-1, 1]."""
        return decode_latents(self.vae, z)


class PixelDiscriminator(ModelMixin, ConfigMixin):
    """A head of Stage II on patches of 4 x 4 pixels of what a clip has beyond its LR clip.

    On pixels as they are, it learns brightness and colour for hundreds of updates, and of detail nothing.
    """

    @register_to_config
    def __init__(
        self, hidden_channels: int = 64, kernel_size: tuple[int, int, int] = (1, 3, 3), layers: int = 2
    ) -> None:
        super().__init__()
        config = HeadConfig(hidden_channels=hidden_channels, kernel_size=tuple(kernel_size), layers=layers)  # type: ignore[arg-type]
        self.head = Head(3 * PATCH_PX**2, config)

    def forward(self, pixels: Tensor, low_resolution: Tensor) -> Tensor:
        """(B, 3, F, H, W) and (B, 3, F, H/4, W/4) to logits (B, 1, F, H/4, W/4)."""
        low = low_resolution.transpose(1, 2).flatten(0, 1)
        enlarged = F.interpolate(low, size=pixels.shape[3:], mode="bicubic").unflatten(0, (len(pixels), -1))
        frames = (GAIN * (pixels.transpose(1, 2) - enlarged)).to(self.dtype)
        patches = F.pixel_unshuffle(frames.flatten(0, 1), PATCH_PX).unflatten(0, frames.shape[:2])
        return self.head(patches.transpose(1, 2))


class Perceptual(ModelMixin, ConfigMixin):
    """LPIPS (AlexNet), the distance of two clips in features of a classifier."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        from metrics.lpips import lpips_network

        self.network = lpips_network()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Mean over the frames of two clips (B, 3, F, H, W) in [-1, 1]."""
        frames = (clip.to(self.dtype).transpose(1, 2).flatten(0, 1) for clip in (a, b))
        return self.network(*frames).float().mean()


def load_fast_decoder(folder: Path | None, model: ModelConfig, config: FastDecoderConfig, seed: int) -> FastDecoder:
    """The fast decoder of a model folder; where it has none, one that begins as the linear path of a small VAE."""
    vae = vae_of(model)
    shape = config.shape.model_dump()
    if vae is not None:
        shape |= {name: vae.config[name] for name in ("latents_mean", "latents_std")}
    decoder = _opened(FastDecoder, "fast_decoder", folder, model, seed, shape)
    if isinstance(vae, SmallVideoVAE) and not holds(folder, "fast_decoder"):
        decoder.start_as(vae)
    return decoder


def load_lr_encoder(
    folder: Path | None, model: ModelConfig, config: LrEncoderConfig, seed: int
) -> LowResolutionEncoder:
    """The LR encoder of a model folder; untrained where it has none."""
    return _opened(LowResolutionEncoder, "lr_encoder", folder, model, seed, config.shape.model_dump())


def vae_of(model: ModelConfig) -> VAE | None:
    """The VAE of the preset, None where it is not there; without values on the meta device."""
    if not (Path(model.vae) / "config.json").is_file():
        return None
    if torch.get_default_device().type == "meta":
        vae = vae_class(model.vae)
        return vae.from_config(vae.load_config(model.vae))
    return load_vae(model.vae)


def holds(folder: Path | None, name: str) -> bool:
    """Whether a model folder has that component."""
    return folder is not None and (folder / name).is_dir()


def _opened(
    network_class: Any, name: str, folder: Path | None, model: ModelConfig, seed: int, shape: dict[str, Any]
) -> Any:
    """
    Raises:
        UserError: `folder` is no model folder, or its network has another number of latent channels.
    """
    if folder is not None and not (folder / "model_index.json").is_file():
        raise UserError(f"--init {folder}: model_index.json is missing; give the model folder that gets the {name}")
    channels = model.transformer.latent_channels
    if folder is None or not holds(folder, name):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return network_class(z_dim=channels, **shape)
    network = network_class.from_pretrained(folder / name, use_safetensors=True).float()
    if network.config.z_dim != channels:
        raise UserError(
            f"{folder / name} has {network.config.z_dim} latent channels, model.transformer.latent_channels is "
            f"{channels}; give the preset of that model"
        )
    return network.requires_grad_(True).train()


def load_full_decoder(folder: Path | None, model: ModelConfig, config: Any, seed: int) -> VAE:
    """The VAE of the preset.

    Raises:
        UserError: it is not there.
    """
    return vae_of(model) or load_vae(model.vae)


def load_discriminator(
    folder: Path | None, model: ModelConfig, config: FastDecoderConfig, seed: int
) -> PixelDiscriminator:
    """Untrained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PixelDiscriminator(**config.discriminator.model_dump())


def load_perceptual(folder: Path | None, model: ModelConfig, config: Any, seed: int) -> Perceptual:
    """With its published weights.

    Raises:
        UserError: a file of them is not there.
    """
    network = Perceptual()
    if torch.get_default_device().type != "meta":
        from metrics.lpips import fill_lpips

        fill_lpips(network.network)
    return network


def assemble(config: FastDecoderConfig, networks: dict[str, nn.Module], shape: Any, seed: int) -> dict[str, nn.Module]:
    """`StageSpec.assemble`: the VAE decodes."""
    if "full_decoder" in networks:
        networks["full_decoder"] = FullDecoder(networks["full_decoder"])  # type: ignore[arg-type]
    return networks


def export(folder: Path, trained: Trained, init: Path | None) -> None:
    """The model folder of `--init` with what was trained: the decoder, its student where that was, or the encoder."""
    assert init is not None
    components: dict[str, Any] = {}
    for name, (module, state) in trained.items():
        network: Any = type(module).from_config(module.config)  # type: ignore[attr-defined]
        network.load_state_dict(state, strict=True)
        network.register_to_config(_name_or_path="")  # diffusers notes the folder it was loaded from
        if name == "student":
            saved = next(load_transformer(init, saved_config(init), dtype=None).parameters()).dtype
            name, network = "transformer", network.to(saved)
        components[name] = network
    add_components(folder, init, components)

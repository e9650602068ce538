"""The critic of Stage II: fake score θ_F and discriminator heads φ on tapped features of θ_R and θ_F.

One module, hence one engine: heads in an engine of their own gave wrong gradients under accumulation. It
runs as one forward per micro-batch, of which the fake score's pass at z_t^S serves L_Diff, DMD, GAN and
feature matching.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.model.transformer import VSRTransformer, tapped_layers
from trainer.stages.dual_stream.config import DualStreamConfig, HeadConfig, Tapped
from trainer.stages.losses import per_token_norm


class Head(nn.Module):
    """Features on the token grid, (B, C, T', H', W') -> logits (B, 1, T', H', W')."""

    def __init__(self, channels: int, config: HeadConfig) -> None:
        super().__init__()
        width, kernel = config.hidden_channels, config.kernel_size
        padding = tuple(size // 2 for size in kernel)
        layers: list[nn.Module] = [nn.Conv3d(channels, width, 1)]
        for _ in range(config.layers):
            layers += [nn.SiLU(), nn.Conv3d(width, width, kernel, padding=padding)]
        layers += [nn.SiLU(), nn.Conv3d(width, 1, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


class CriticOutput(NamedTuple):
    """v_F where asked for; features and logits are one tensor per tap, empty without a discriminator."""

    velocity: Tensor | None
    features_s: tuple[Tensor, ...]
    features_hr: tuple[Tensor, ...]
    logits_s: tuple[Tensor, ...]
    logits_hr: tuple[Tensor, ...]


class Critic(nn.Module):
    """Fake score and heads: `heads` is empty without a GAN stream, `transformer` None where nothing looks at it."""

    def __init__(
        self,
        transformer: VSRTransformer | None,
        *,
        shape: Any = None,
        taps: tuple[int, ...] = (),
        tapped: Tapped = "both",
        head: HeadConfig | None = None,
    ) -> None:
        """
        Args:
            shape: configuration of the tapped models, needed where there is no `transformer`.
            taps: the 1-based layers the heads look at; none means no discriminator.
        """
        super().__init__()
        self.transformer = transformer
        self.shape = shape if transformer is None else transformer.config
        self.taps = taps
        self.tapped = tapped
        self.head_config = head or HeadConfig()
        width = self.shape.num_attention_heads * self.shape.attention_head_dim
        channels = width * (2 if tapped == "both" else 1)
        self.heads = nn.ModuleList([Head(channels, self.head_config) for _ in taps])

    def forward(
        self,
        z_t: Tensor,
        t: Tensor,
        z_lr: Tensor,
        prompt: Tensor,
        discriminator_hr: Tensor | None = None,
        clean_s: Tensor | None = None,
        real_s: tuple[Tensor, ...] = (),
        real_hr: tuple[Tensor, ...] = (),
        *,
        velocity: bool = True,
        stop_gradient: bool = False,
        with_logits_hr: bool = True,
    ) -> CriticOutput:
        """Everything one update needs of θ_F and φ.

        Args:
            z_t, t, z_lr, prompt: as in `VSRTransformer`; the diffused student sample.
            discriminator_hr: what the discriminator takes for real, None without GAN; (n·B, C, T, H, W) where
                perturbed inputs follow, of which only logits are wanted.
            clean_s: what it takes for fake at t = 0; None: it looks at `z_t`, so that one forward gives both
                velocity and features.
            real_s, real_hr: the tapped features of θ_R for both, empty if it isn't tapped.
            velocity: whether v_F is needed.
            stop_gradient: sg[h^S]: L_D updates the heads only, never the fake score.
            with_logits_hr: whether the heads look at h^HR too.
        """
        if not self.heads or discriminator_hr is None:
            assert self.transformer is not None
            return CriticOutput(self.transformer(z_t, t, z_lr, prompt).velocity, (), (), (), ())
        discriminator_t = t if clean_s is None else torch.zeros_like(t)
        taps = self.taps if self.tapped != "real" else ()
        features_hr: tuple[Tensor, ...] = ()
        if taps:
            with torch.no_grad():
                inputs = repeated(len(discriminator_hr) // len(z_t), discriminator_t, z_lr, prompt)
                features_hr = features_of(self.transformer, discriminator_hr, *inputs, taps)
        v, features_s = velocity_and_features(
            self.transformer, z_t, t, z_lr, prompt, taps, velocity=velocity, clean=clean_s
        )
        if stop_gradient:
            features_s = tuple(feature.detach() for feature in features_s)

        grid = token_grid(z_t.shape, self.shape.patch_size)
        logits_s = self._logits(real_s, features_s, grid)
        logits_hr = self._logits(real_hr, features_hr, grid) if with_logits_hr else ()
        return CriticOutput(v, features_s, features_hr, logits_s, logits_hr)

    def _logits(self, real: Sequence[Tensor], fake: Sequence[Tensor], grid: tuple[int, int, int]) -> tuple[Tensor, ...]:
        """D(h): h = concat(Feat_θR, Feat_θF) along channels, laid out on the token grid."""
        logits = []
        for index, head in enumerate(self.heads):
            parts = [features[index] for features in (real, fake) if features]
            h = torch.cat([per_token_norm(part) for part in parts], dim=-1)
            h = h.transpose(1, 2).unflatten(2, grid)
            logits.append(head(h.to(head.layers[0].weight.dtype)).float())
        return tuple(logits)


def assemble_critic(
    config: DualStreamConfig, transformers: dict[str, nn.Module], shape: Any, seed: int
) -> dict[str, nn.Module]:
    """`StageSpec.assemble`: heads beside the fake score, whose weights are a copy of the real score's [paper].

    Args:
        transformers: of student, real_score and, where anything looks at the fake score, critic.
        shape: configuration of the tapped models.
    """
    torch.manual_seed(seed)  # the heads are the only weights made here: the same on every rank
    critic = Critic(
        transformers.get("critic"),  # type: ignore[arg-type]
        shape=shape,
        taps=tapped_layers(shape.num_layers, config.tap_fractions) if config.gan else (),
        tapped=config.tapped,
        head=config.head,
    )
    return transformers | {"critic": critic}


def parameter_groups(critic: Critic, config: DualStreamConfig) -> list[dict[str, Any]]:
    """θ_F (of which the parameters that ask for a gradient are trained) and φ with numbers of its own."""
    groups: list[dict[str, Any]] = []
    if critic.transformer is not None:
        trained = [p for p in critic.transformer.parameters() if p.requires_grad]
        groups.append({"name": "fake_score", "params": trained})
    if config.gan:
        heads = {"lr": config.heads_learning_rate, "gradient_clip": config.heads_gradient_clip}
        groups.append({"name": "heads", "params": list(critic.heads.parameters())} | heads)
    return groups


def velocity_and_features(
    model: Any,
    z_t: Tensor,
    t: Tensor,
    z_lr: Tensor,
    prompt: Tensor,
    taps: tuple[int, ...],
    *,
    velocity: bool = True,
    clean: Tensor | None = None,
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """v(z_t, t) and tapped features: in one forward, or features of `clean` at t = 0 in a second one."""
    if clean is None and (velocity or taps):
        out = model(z_t, t, z_lr, prompt, taps, features_only=not velocity)
        return out.velocity, out.features
    v = model(z_t, t, z_lr, prompt).velocity if velocity else None
    features = features_of(model, clean, torch.zeros_like(t), z_lr, prompt, taps) if taps else ()
    return v, features


def repeated(n: int, t: Tensor, z_lr: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What latents are conditioned on, `n` times along the batch."""
    return t.repeat(n), z_lr.repeat(n, 1, 1, 1, 1), prompt.repeat(n, 1, 1)


def features_of(
    model: Any, z_t: Tensor, t: Tensor, z_lr: Tensor, prompt: Tensor, taps: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """Tapped features alone: the pass stops after the last tap (layer 27 of 30)."""
    return model(z_t, t, z_lr, prompt, taps, features_only=True).features


def token_grid(latent_shape: torch.Size, patch_size: Sequence[int]) -> tuple[int, int, int]:
    """(T', H', W') of the tokens of a latent (B, C, T, H, W)."""
    t, h, w = (size // patch for size, patch in zip(latent_shape[2:], patch_size, strict=True))
    return t, h, w

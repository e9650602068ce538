"""Stage II, dual-stream distillation: the paper's Algorithm 1.

Per step: N auxiliary updates of the critic (fake score θ_F by L_Diff, heads φ by L_D), then one update of the
student θ_S by L_S = λ_DMD·L_DMD + λ_GAN·L_G + λ_FM·L_FM. The real score θ_R is frozen. S marks what comes
from the student's sample, HR what comes from the data.

The student's loss depends on its parameters only through ẑ0. So ẑ0 is cut off into a leaf, the gradient of
L_S is taken down to that leaf network by network, and the student's engine is given (ẑ0·grad).sum(), whose
gradient is the same. No autograd graph spans two engines, which ZeRO-3 would not survive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pipeline.flow_matching import q_t, velocity, x0_from_velocity
from pipeline.model.transformer import VSRTransformer, tapped_layers
from pipeline.sampling import one_step
from trainer.engine.network import DeepSpeedConfig, Network
from trainer.stages.dual_stream.auxiliary_networks import Critic, features_of, velocity_and_features
from trainer.stages.dual_stream.config import DualStreamConfig
from trainer.stages.losses import (
    discriminator_loss,
    dmd_gradient,
    dmd_loss,
    feature_matching_loss,
    generator_loss,
    velocity_loss,
)
from trainer.stages.stage import Draws, Meter

if TYPE_CHECKING:
    from datagen.dataset.loader import Batch

__all__ = ["DualStream", "DualStreamConfig", "Sample"]


class Sample(NamedTuple):
    """Algorithm 1's "Sample (z^LR, z^HR, c), t, ε" for one micro-batch; latents (B, C, T, H, W), float32.

    The generator's ε (`noise_s`) and q_t's (`noise`) are drawn apart: with one ε for both, z_t^S would lie
    on the very line the student has just walked. HR is diffused with q_t's ε too, or feature matching would
    compare noise.
    """

    z_lr: Tensor
    z_hr: Tensor
    prompt: Tensor
    t: Tensor
    noise_s: Tensor
    noise: Tensor
    noise_hr: Tensor


class DualStream:
    """Implements `trainer.stages.stage.Stage`."""

    name = "dual_stream"
    preview_names: tuple[str, ...] = ("student", "real_score", "fake_score")

    def __init__(
        self,
        config: DualStreamConfig,
        *,
        student: Network,
        critic: Network,
        real_score: Network,
        embed: Callable[[list[str]], Tensor],
        seed: int,
        device: torch.device | str,
    ) -> None:
        """Take networks as they are; `build` makes them.

        Args:
            student: a `VSRTransformer`.
            critic: a `Critic`.
            real_score: a `VSRTransformer`, never updated.
            embed: captions -> prompt embeddings (B, L, text_dim); "" is the null prompt.
            seed: run seed of all draws.
        """
        self.config = config
        self.student, self.critic, self.real_score = student, critic, real_score
        self.networks: dict[str, Network] = {"student": student, "critic": critic, "real_score": real_score}
        self.exported = student
        accumulation = {student.config.gradient_accumulation, critic.config.gradient_accumulation}
        if len(accumulation) > 1:
            raise ValueError("student and critic must have the same gradient_accumulation")
        self._accumulation = accumulation.pop()
        self.batches_per_step = (config.auxiliary_updates + 1) * self._accumulation
        self._embed, self._seed, self._device = embed, seed, torch.device(device)
        taps = critic.module.taps
        self._real_taps: tuple[int, ...] = taps if config.tapped != "fake" else ()
        if not config.needs_fake_score:
            self.preview_names = ("student", "real_score")

    @classmethod
    def build(
        cls,
        config: DualStreamConfig,
        *,
        student: VSRTransformer,
        real_score: VSRTransformer,
        fake_score: VSRTransformer | None,
        engines: dict[str, DeepSpeedConfig],
        embed: Callable[[list[str]], Tensor],
        seed: int,
        device: torch.device | str,
    ) -> DualStream:
        """Wrap modules in their engines.

        Args:
            student: from Stage I.
            real_score: the multi-step teacher.
            fake_score: a copy of `real_score`'s weights to begin with [paper], of which the parameters that ask for a
                gradient learn; None where nothing asks for one (`DualStreamConfig.needs_fake_score`).
            engines: how each of student, critic, real_score is sharded.
        """
        if (fake_score is not None) != config.needs_fake_score:
            raise ValueError("a fake score must be given if and only if config.needs_fake_score")
        depth = len(real_score.blocks)
        torch.manual_seed(seed)  # the heads are the only weights made here: the same on every rank
        critic = Critic(
            fake_score,
            shape=real_score.config,
            taps=tapped_layers(depth, config.tap_fractions) if config.gan else (),
            tapped=config.tapped,
            head=config.head,
        )
        groups: list[dict[str, Any]] = []
        if fake_score is not None:
            groups.append({"params": [p for p in fake_score.parameters() if p.requires_grad]})
        if config.gan:
            groups.append({"params": list(critic.heads.parameters()), "lr": config.heads_learning_rate})
        return cls(
            config,
            student=Network(
                "student",
                student,
                deepspeed=engines["student"],
                optimizer=config.student,
                ema_decay=config.ema_decay,
            ),
            critic=Network(
                "critic",
                critic,
                deepspeed=engines["critic"],
                optimizer=config.fake_score,
                parameter_groups=groups,
            ),
            real_score=Network("real_score", real_score, deepspeed=engines["real_score"]),
            embed=embed,
            seed=seed,
            device=device,
        )

    # --- Algorithm 1 ----------------------------------------------------------------------------------------

    def train_step(self, step: int, batches: Sequence[Batch]) -> dict[str, float]:
        """N auxiliary updates, then one student update; each on batches of its own."""
        meter = Meter(self._device)
        self.updates(step, batches, meter)
        return meter.means()

    def updates(self, step: int, batches: Sequence[Batch], meter: Meter) -> None:
        """θ_F and φ N times, then θ_S."""
        queue = [batches[i : i + self._accumulation] for i in range(0, len(batches), self._accumulation)]
        for update, micro_batches in enumerate(queue[:-1]):
            self.auxiliary_update(step, update, micro_batches, meter)
        self.student_update(step, queue[-1], meter)

    def phase(self, step: int) -> tuple[bool, ...]:
        """Which of DMD, GAN and feature matching the student hears."""
        return tuple(weight > 0 for weight in self.weights(step))

    def auxiliary_update(self, step: int, update: int, batches: Sequence[Batch], meter: Meter) -> None:
        """θ_F descends L_Diff; φ descends L_D."""
        with self.critic.updating():
            for batch in batches:
                s = self._sample(batch, step, update)
                with torch.no_grad():
                    z0 = one_step(_velocity_of(self.student.frozen), s.noise_s, s.z_lr, s.prompt)
                z_t = q_t(z0, s.noise, s.t)
                judged_hr, clean = self._judged_hr(s), self._clean(z0)

                with torch.no_grad():  # "stop_grad backbones": θ_R only lends its features here
                    real_s, real_hr = self._real_features(z_t if clean is None else clean, judged_hr, s)
                # sg[h^S], sg[h^HR]: only L_Diff teaches the fake score, L_D teaches the heads.
                out = self.critic(
                    z_t,
                    s.t,
                    s.z_lr,
                    s.prompt,
                    judged_hr,
                    clean,
                    real_s,
                    real_hr,
                    velocity=self.config.needs_fake_score,
                    stop_gradient=True,
                )
                # The terms share no parameter: descending the sum is descending each on its own.
                loss = z0.new_zeros(())
                if self.config.needs_fake_score:
                    loss_diffusion = velocity_loss(out.velocity, velocity(z0, s.noise))
                    loss = loss + loss_diffusion
                    meter.add(loss_diffusion=loss_diffusion)
                if self.config.gan:
                    loss_d = discriminator_loss(out.logits_hr, out.logits_s, self.config.gan_loss)
                    loss = loss + loss_d
                    meter.add(loss_discriminator=loss_d, d_hr=_mean(out.logits_hr), d_s=_mean(out.logits_s))
                self.critic.backward(loss)
            self._critic_step(meter)

    def _critic_step(self, meter: Meter) -> None:
        """Both groups are clipped by their joint norm; the log also says how it divides."""
        if not (self.config.gan and self.config.needs_fake_score):
            meter.add(gradient_norm_critic=self.critic.step())
            return
        heads = self.critic.gradient_norm("heads.")
        joint = self.critic.step()
        # where the heads' norm dwarfs the fake score's, the difference of squares is only good to 1e-3 of the joint
        fake_score = max(joint**2 - heads**2, 0.0) ** 0.5
        meter.add(gradient_norm_critic=joint, gradient_norm_heads=heads, gradient_norm_fake_score=fake_score)

    def student_update(self, step: int, batches: Sequence[Batch], meter: Meter) -> None:
        """θ_S descends L_S."""
        with self.student.updating():
            for batch in batches:
                s = self._sample(batch, step, self.config.auxiliary_updates)
                # The generator always sits at t = 1, see one_step; Algorithm 1's t belongs to q_t alone.
                z0 = one_step(_velocity_of(self.student), s.noise_s, s.z_lr, s.prompt)
                leaf = z0.detach().requires_grad_()
                gradient = self.student_gradient(step, leaf, s, meter)
                self.student.backward((z0 * gradient).sum())
                meter.add(latent_mean=leaf.mean(), latent_std=leaf.std())
            meter.add(gradient_norm_student=self.student.step())

    def student_gradient(self, step: int, z0: Tensor, s: Sample, meter: Meter) -> Tensor:
        """∂L_S/∂ẑ0 at the leaf `z0`; same shape, float32.

        Algorithm 1 prints D = H(sg[h^S]) here; taken literally, no gradient of L_G would reach the student.
        What is meant: the *parameters* of θ_R, θ_F and φ are constant, and the gradient flows through their
        activations. h^HR is constant, and needed anew: this batch, this θ_F.

        One forward of each score model at z_t^S serves DMD, GAN and FM.
        """
        dmd_weight, gan_weight, fm_weight = self.weights(step)
        dmd, gan = dmd_weight > 0, gan_weight > 0 or fm_weight > 0
        judged_hr, clean = (self._judged_hr(s), self._clean(z0)) if gan else (None, None)

        # Each score model gets a z_t^S of its own, so that their graphs can be walked and freed one by one.
        with torch.set_grad_enabled(gan):
            z_t = q_t(z0, s.noise, s.t)
            v_real, real_s = self._real_forward(z_t, clean, s, dmd=dmd, gan=gan)
        z0_real = x0_from_velocity(z_t, v_real, s.t).detach() if dmd else None
        del v_real  # sg: DMD needs no graph behind the last tap
        with torch.no_grad():
            real_hr = self._real_features(None, judged_hr, s)[1]
        real_leaves = tuple(feature.detach().requires_grad_() for feature in real_s)

        with torch.set_grad_enabled(gan):
            z_t = q_t(z0, s.noise, s.t)
            out = self.critic.frozen(
                z_t,
                s.t,
                s.z_lr,
                s.prompt,
                judged_hr,
                clean,
                real_leaves,
                real_hr,
                velocity=dmd,
                judge_hr=self.config.gan_loss == "relativistic",
            )
        loss = z0.new_zeros(())
        if dmd:
            z0_fake = x0_from_velocity(z_t, out.velocity, s.t).detach()
            out = out._replace(velocity=None)
            gradient, normaliser = dmd_gradient(z0, z0_real, z0_fake)
            loss_dmd = dmd_loss(z0, gradient)
            loss = loss + dmd_weight * loss_dmd
            meter.add(loss_dmd=loss_dmd, dmd_normaliser=normaliser.mean())
        if gan:
            loss_g = generator_loss(out.logits_s, out.logits_hr, self.config.gan_loss)
            loss_fm = feature_matching_loss((*real_leaves, *out.features_s), (*real_hr, *out.features_hr))
            loss = loss + gan_weight * loss_g + fm_weight * loss_fm
            meter.add(loss_generator=loss_g, loss_feature_matching=loss_fm)
        meter.add(loss_student=loss)
        del out

        # Through φ and θ_F first, down to ẑ0 and θ_R's features; then, θ_F's activations gone, through θ_R.
        at_z0, *at_real = torch.autograd.grad(loss, [z0, *real_leaves], allow_unused=True)
        total = torch.zeros_like(z0) if at_z0 is None else at_z0
        if real_s:
            total = total + torch.autograd.grad(real_s, z0, at_real)[0]
        return total

    def weights(self, step: int) -> tuple[float, float, float]:
        """λ_DMD, λ_GAN, λ_FM as the student hears them at `step`; the critic never stops learning."""
        config = self.config
        dmd, gan, fm = config.dmd_weight, config.gan_weight, config.feature_matching_weight
        if config.schedule == "sequential":
            return (dmd, 0.0, 0.0) if step < config.sequential_dmd_steps else (0.0, gan, fm)
        if step < config.heads_warmup_steps:
            return dmd, 0.0, 0.0
        return dmd, gan, fm

    # --- what both updates share ----------------------------------------------------------------------------

    def _sample(self, batch: Batch, step: int, update: int) -> Sample:
        config, low, high = self.config, *self.config.time_range
        draws = Draws(batch.keys, self._seed, self.name, step, update, device=self._device)
        z_hr = batch.tensors["z_hr"].to(self._device, torch.float32)
        noise = draws.noise("diffusion", z_hr)
        return Sample(
            z_lr=batch.tensors["z_lr"].to(self._device, torch.float32),
            z_hr=z_hr,
            prompt=self._embed([entry["caption"] for entry in batch.metadata]).to(self._device),
            t=draws.times("time", shift=config.time_shift, low=low, high=high),
            noise_s=draws.noise("generator", z_hr),
            noise=noise,
            noise_hr=noise if config.shared_noise else draws.noise("diffusion_hr", z_hr),
        )

    def _judged_hr(self, s: Sample) -> Tensor | None:
        """What the discriminator takes for real: z_t^HR, which shares t with z_t^S; None without GAN."""
        if not self.config.gan:
            return None
        return s.z_hr if self.config.discriminator_input == "clean" else q_t(s.z_hr, s.noise_hr, s.t)

    def _clean(self, z0: Tensor) -> Tensor | None:
        """ẑ0 where the discriminator looks at clean latents; None where it looks at z_t^S."""
        return z0 if self.config.gan and self.config.discriminator_input == "clean" else None

    def _real_forward(
        self, z_t: Tensor, clean: Tensor | None, s: Sample, *, dmd: bool, gan: bool
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """v_R(z_t^S) where DMD asks for it, and Feat_θR of the student's sample where the GAN stream does."""
        taps = self._real_taps if gan else ()
        v, features = velocity_and_features(
            self.real_score.frozen, z_t, s.t, s.z_lr, s.prompt, taps, velocity=dmd, clean=clean
        )
        if v is not None and self.config.real_score_guidance:
            with torch.no_grad():
                null = self._embed([""] * len(z_t)).to(self._device)
                v_null = self.real_score.frozen(z_t, s.t, s.z_lr, null).velocity
            v = v + self.config.real_score_guidance * (v - v_null)
        return v, features

    def _real_features(
        self, judged_s: Tensor | None, judged_hr: Tensor | None, s: Sample
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Feat_θR of S and HR in one pass (one gather of the weights); either may be left out."""
        judged = [z for z in (judged_s, judged_hr) if z is not None]
        if not self._real_taps or judged_hr is None:
            return (), ()
        t = torch.zeros_like(s.t) if self.config.discriminator_input == "clean" else s.t
        n = len(judged)
        features = features_of(
            self.real_score.frozen,
            torch.cat(judged),
            t.repeat(n),
            s.z_lr.repeat(n, 1, 1, 1, 1),
            s.prompt.repeat(n, 1, 1),
            self._real_taps,
        )
        batch = len(s.t)
        return tuple(f[:-batch] for f in features), tuple(f[-batch:] for f in features)

    # --- the Stage protocol's rest --------------------------------------------------------------------------

    @torch.no_grad()
    def previews(self, batch: Batch) -> dict[str, Tensor]:
        """x0 predictions of all networks, the score models looking at z_t^S at `preview_time`.

        The noise is always the same for a sample, so pictures of different steps compare. In DMD these show a
        drift before any loss does.
        """
        s = self._sample(batch, -1, 0)
        t = torch.full_like(s.t, self.config.preview_time)
        z0 = one_step(_velocity_of(self.student.frozen), s.noise_s, s.z_lr, s.prompt)
        z_t = q_t(z0, s.noise, t)
        v_real, _ = self._real_forward(z_t, None, s._replace(t=t), dmd=True, gan=False)
        shown = {"student": z0, "real_score": x0_from_velocity(z_t, v_real, t)}
        if self.config.needs_fake_score:
            v_fake = self.critic.frozen(z_t, t, s.z_lr, s.prompt).velocity
            shown["fake_score"] = x0_from_velocity(z_t, v_fake, t)
        return shown

    def state_dict(self) -> dict[str, Any]:
        """Nothing: draws and schedules are functions of the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _velocity_of(call: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda *inputs: call(*inputs).velocity


def _mean(logits: Sequence[Tensor]) -> Tensor:
    return torch.stack([logit.detach().mean() for logit in logits]).mean()

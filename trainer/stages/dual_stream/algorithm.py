"""Stage II, dual-stream distillation: the paper's Algorithm 1, whose line numbers stand beside the lines here.

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
from pipeline.model.config import NULL_PROMPT
from pipeline.sampling import one_step
from trainer.stages.dual_stream.auxiliary_networks import (
    Critic,
    features_of,
    parameter_groups,
    repeated,
    velocity_and_features,
)
from trainer.stages.dual_stream.switches import data_forcing, decoupled_guidance, penalties, with_perturbed
from trainer.stages.losses import (
    discriminator_loss,
    dmd_gradient,
    dmd_loss,
    feature_matching_loss,
    generator_loss,
    velocity_loss,
)
from trainer.stages.stage import Meter, StageSetup, TrainingStage

if TYPE_CHECKING:
    from datagen.dataset.loader import Batch


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
    #: t and ε at which the guidance of θ_R is evaluated, where they are its own
    guidance: tuple[Tensor, Tensor] | None


class DualStream(TrainingStage):
    """Student, critic (fake score and heads) and frozen real score, each in an engine of its own."""

    preview_names: tuple[str, ...] = ("student", "real_score", "fake_score")

    def __init__(self, setup: StageSetup) -> None:
        super().__init__(setup)
        self.student = self.exported = setup.network("student")
        critic = setup.modules["critic"]
        assert isinstance(critic, Critic)
        self.critic = setup.network("critic", parameter_groups(critic, self.config))
        self.real_score = setup.network("real_score")
        self.networks = {"student": self.student, "critic": self.critic, "real_score": self.real_score}
        self._accumulation = self.student.config.gradient_accumulation
        self._real_taps: tuple[int, ...] = critic.taps if self.config.tapped != "fake" else ()
        if not self.config.needs_fake_score:
            self.preview_names = ("student", "real_score")

    @property
    def batches_per_step(self) -> int:
        """Those of N auxiliary updates and of the student's."""
        return (self.config.auxiliary_updates + 1) * self._accumulation

    # --- Algorithm 1 ----------------------------------------------------------------------------------------

    def updates(self, step: int, batches: Sequence[Batch], meter: Meter) -> None:
        """One round of line 1's loop: θ_F and φ N times, then θ_S; each update on batches of its own."""
        queue = [batches[i : i + self._accumulation] for i in range(0, len(batches), self._accumulation)]
        for update, micro_batches in enumerate(queue[:-1]):  # line 2
            self.auxiliary_update(step, update, micro_batches, meter)
        if any(self.weights(step)):  # without DMD, nothing teaches the student while the heads warm up
            self.student_update(step, queue[-1], meter)

    def objective(self, step: int) -> str:
        """The terms of L_S with a weight at `step`."""
        terms = zip(("DMD", "GAN", "FM", "DF"), (*self.weights(step), float(self.forces_data(step))), strict=True)
        return " + ".join(name for name, weight in terms if weight > 0) or "heads alone"

    def auxiliary_update(self, step: int, update: int, batches: Sequence[Batch], meter: Meter) -> None:
        """Lines 3-15: θ_F descends L_Diff, φ descends L_D."""
        with self.critic.updating():
            for batch in batches:
                s = self._sample(batch, step, update)  # line 3
                with torch.no_grad():  # line 4: ẑ0^S
                    z0 = one_step(_velocity_of(self.student.frozen), s.noise_s, s.z_lr, s.prompt)
                z_t = q_t(z0, s.noise, s.t)  # line 5
                discriminator_hr, clean = self._discriminator_hr(s), self._clean(z0)
                discriminator_s = z_t if clean is None else clean
                if discriminator_hr is not None:
                    draws = self.draws(step, batch, update)
                    discriminator_hr = with_perturbed(self.config, draws, discriminator_hr, discriminator_s)

                with torch.no_grad():  # line 8, "stop_grad backbones": θ_R only gives features here
                    real_s, real_hr = self._real_features(discriminator_s, discriminator_hr, s)
                # Lines 9-12. sg[h^S], sg[h^HR]: θ_F is trained by L_Diff alone, φ by L_D alone.
                out = self.critic(
                    z_t,
                    s.t,
                    s.z_lr,
                    s.prompt,
                    discriminator_hr,
                    clean,
                    real_s,
                    real_hr,
                    velocity=self.config.needs_fake_score,
                    stop_gradient=True,
                )
                # The terms share no parameter: descending the sum is descending each on its own.
                loss = z0.new_zeros(())
                if self.config.needs_fake_score:
                    loss_diffusion = velocity_loss(out.velocity, velocity(z0, s.noise))  # lines 6, 7
                    loss = loss + loss_diffusion
                    meter.add(loss_diffusion=loss_diffusion)
                if self.config.gan:
                    # line 13
                    logits_hr, *perturbed = zip(*(d.split(len(z0)) for d in out.logits_hr), strict=True)
                    loss_d = discriminator_loss(logits_hr, out.logits_s, self.config.gan_loss)
                    loss = loss + loss_d
                    for name, penalty in penalties(self.config, logits_hr, out.logits_s, perturbed).items():
                        loss = loss + getattr(self.config, f"{name}_weight") * penalty
                        meter.add(**{f"loss_{name}": penalty})
                    meter.add(loss_discriminator=loss_d, d_hr=_mean(logits_hr), d_s=_mean(out.logits_s))
                self.critic.backward(loss)
            self._critic_step(meter)  # lines 14, 15

    def _critic_step(self, meter: Meter) -> None:
        meter.add(gradient_norm_critic=self.critic.step())
        meter.add(**{f"gradient_norm_{name}": norm for name, norm in self.critic.group_norms.items()})

    def student_update(self, step: int, batches: Sequence[Batch], meter: Meter) -> None:
        """Lines 16-27: θ_S descends L_S."""
        with self.student.updating():
            for batch in batches:
                s = self._sample(batch, step, self.config.auxiliary_updates)  # line 16
                # Line 17. The generator's time is always t = 1, see one_step; Algorithm 1's t belongs to q_t alone.
                z0 = one_step(_velocity_of(self.student), s.noise_s, s.z_lr, s.prompt)
                leaf = z0.detach().requires_grad_()
                gradient = self.student_gradient(step, leaf, s, meter)
                self.student.backward((z0 * gradient).sum())
                meter.add(latent_mean=leaf.mean(), latent_std=leaf.std())
            meter.add(gradient_norm_student=self.student.step())  # line 27

    def student_gradient(self, step: int, z0: Tensor, s: Sample, meter: Meter) -> Tensor:
        """Lines 18-26: ∂L_S/∂ẑ0 at the leaf `z0`; same shape, float32.

        Algorithm 1 prints D = H(sg[h^S]) in line 23; taken literally, no gradient of L_G would reach the student.
        What is meant: the *parameters* of θ_R, θ_F and φ are constant, and the gradient flows through their
        activations. h^HR is constant, and needed anew: this batch, this θ_F.

        One forward of each score model at z_t^S serves DMD, GAN and FM.
        """
        dmd_weight, gan_weight, fm_weight = self.weights(step)
        dmd, gan = dmd_weight > 0, gan_weight > 0 or fm_weight > 0
        discriminator_hr, clean = (self._discriminator_hr(s), self._clean(z0)) if gan else (None, None)

        # Each score model gets a z_t^S of its own, so that their graphs can be walked and freed one by one.
        with torch.set_grad_enabled(gan):
            z_t = q_t(z0, s.noise, s.t)  # line 18
            v_real, real_s = self._real_forward(z_t, clean, s, dmd=dmd, gan=gan)
        z0_real = x0_from_velocity(z_t, v_real, s.t).detach() if dmd else None  # line 19: ẑ0^R
        del v_real  # sg: DMD needs no graph behind the last tap
        with torch.no_grad():
            real_hr = self._real_features(None, discriminator_hr, s)[1]
        real_leaves = tuple(feature.detach().requires_grad_() for feature in real_s)

        with torch.set_grad_enabled(gan):
            z_t = q_t(z0, s.noise, s.t)
            out = self.critic.frozen(  # lines 22, 23
                z_t,
                s.t,
                s.z_lr,
                s.prompt,
                discriminator_hr,
                clean,
                real_leaves,
                real_hr,
                velocity=dmd,
                with_logits_hr=self.config.gan_loss == "relativistic",
            )
        terms: dict[str, Tensor] = {}
        if dmd:
            z0_fake = x0_from_velocity(z_t, out.velocity, s.t).detach()  # line 19: ẑ0^F
            out = out._replace(velocity=None)
            gradient, normaliser = dmd_gradient(z0, z0_real, z0_fake)  # line 20
            gradient = gradient + self._switched_gradients(step, z0, s, normaliser)
            loss_dmd = dmd_loss(z0, gradient)  # line 21
            terms["dmd"] = dmd_weight * loss_dmd
            meter.add(loss_dmd=loss_dmd, dmd_normaliser=normaliser.mean())
        if gan:
            loss_g = generator_loss(out.logits_s, out.logits_hr, self.config.gan_loss)  # line 24
            loss_fm = feature_matching_loss(  # line 25
                (*real_leaves, *out.features_s),
                (*real_hr, *out.features_hr),
                normalised=self.config.feature_matching == "normalised",
            )
            terms |= {"gan": gan_weight * loss_g, "feature_matching": fm_weight * loss_fm}
            meter.add(loss_generator=loss_g, loss_feature_matching=loss_fm)
        loss = torch.stack(list(terms.values())).sum()  # line 26
        meter.add(loss_student=loss)
        every = self.config.gradient_norms_every
        if not every or (step + 1) % every:
            terms = {"sum": loss}
        del out, loss
        gradients = _gradients_at_z0(terms, z0, real_leaves, real_s)
        if "sum" not in gradients:
            meter.add(**{f"z0_gradient_norm_{name}": gradient.norm() for name, gradient in gradients.items()})
        return torch.stack(list(gradients.values())).sum(0)

    def _switched_gradients(self, step: int, z0: Tensor, s: Sample, normaliser: Tensor) -> Tensor:
        """What decoupled guidance and data forcing add to DMD's gradient; zero where both are off."""
        config, real_score, total = self.config, self.real_score.frozen, torch.zeros_like(z0)
        if s.guidance is not None:
            prompts = s.prompt, self.embedded([NULL_PROMPT] * len(z0))
            weight = config.real_score_guidance
            total = total + decoupled_guidance(real_score, z0, *s.guidance, s.z_lr, prompts, weight)
        if self.forces_data(step):
            forcing = data_forcing(real_score, s.z_hr, s.t, s.noise_hr, s.z_lr, s.prompt, normaliser)
            total = total + config.data_forcing_weight * forcing
        return total

    def forces_data(self, step: int) -> bool:
        """Whether DMD's gradient is corrected by θ_R's error on real data at `step`."""
        return self.config.data_forcing_weight > 0 and step >= self.config.data_forcing_from_step

    def weights(self, step: int) -> tuple[float, float, float]:
        """λ_DMD, λ_GAN, λ_FM in L_S at `step`; the critic is always trained on all of its terms."""
        config = self.config
        dmd, gan, fm = config.dmd_weight, config.gan_weight, config.feature_matching_weight
        if config.schedule == "sequential":
            return (dmd, 0.0, 0.0) if step < config.sequential_dmd_steps else (0.0, gan, fm)
        if step < config.heads_warmup_steps:
            return dmd, 0.0, 0.0
        return dmd, gan, fm

    # --- what both updates share ----------------------------------------------------------------------------

    def _sample(self, batch: Batch, step: int, update: int) -> Sample:
        low, high = self.config.time_range
        draws, z_hr = self.draws(step, batch, update), self.latents(batch, "z_hr")
        noise = draws.noise("diffusion", z_hr)
        guidance = None
        if self.config.guidance_time_range is not None:
            first, last = self.config.guidance_time_range
            t = draws.times("guidance_time", shift=self.shift, low=first, high=last)
            guidance = (t, draws.noise("guidance", z_hr))
        return Sample(
            z_lr=self.latents(batch, "z_lr"),
            z_hr=z_hr,
            prompt=self.prompts(batch),
            t=draws.times("time", shift=self.shift, low=low, high=high),
            noise_s=draws.noise("generator", z_hr),
            noise=noise,
            noise_hr=noise if self.config.shared_noise else draws.noise("diffusion_hr", z_hr),
            guidance=guidance,
        )

    def _discriminator_hr(self, s: Sample) -> Tensor | None:
        """The discriminator's real input: z_t^HR, which shares t with z_t^S; None without GAN."""
        if not self.config.gan:
            return None
        return s.z_hr if self.config.discriminator_input == "clean" else q_t(s.z_hr, s.noise_hr, s.t)

    def _clean(self, z0: Tensor) -> Tensor | None:
        """ẑ0 where the discriminator's input is clean; None where it is z_t^S."""
        return z0 if self.config.gan and self.config.discriminator_input == "clean" else None

    def _real_forward(
        self, z_t: Tensor, clean: Tensor | None, s: Sample, *, dmd: bool, gan: bool
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """v_R(z_t^S) where DMD asks for it, and Feat_θR of the student's sample where the GAN stream does."""
        taps = self._real_taps if gan else ()
        v, features = velocity_and_features(
            self.real_score.frozen, z_t, s.t, s.z_lr, s.prompt, taps, velocity=dmd, clean=clean
        )
        if v is not None and self.config.real_score_guidance and s.guidance is None:
            with torch.no_grad():
                null = self.embedded([NULL_PROMPT] * len(z_t))
                v_null = self.real_score.frozen(z_t, s.t, s.z_lr, null).velocity
            v = v + self.config.real_score_guidance * (v - v_null)
        return v, features

    def _real_features(
        self, discriminator_s: Tensor | None, discriminator_hr: Tensor | None, s: Sample
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Feat_θR of S and HR in one pass (one gather of the weights); either may be left out."""
        inputs = [z for z in (discriminator_s, discriminator_hr) if z is not None]
        if not self._real_taps or discriminator_hr is None:
            return (), ()
        t = torch.zeros_like(s.t) if self.config.discriminator_input == "clean" else s.t
        z = torch.cat(inputs)
        conditions = repeated(len(z) // len(t), t, s.z_lr, s.prompt)
        features = features_of(self.real_score.frozen, z, *conditions, self._real_taps)
        hr = len(discriminator_hr)
        return tuple(f[:-hr] for f in features), tuple(f[-hr:] for f in features)

    # --- previews -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def previews(self, batch: Batch) -> dict[str, Tensor]:
        """x0 predictions of all networks, the score models looking at z_t^S at `preview_time`.

        The noise is always the same for a sample, so images of different steps compare. In DMD these show a
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


def _velocity_of(call: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda *inputs: call(*inputs).velocity


def _gradients_at_z0(
    terms: dict[str, Tensor], z0: Tensor, real_leaves: Sequence[Tensor], real_s: Sequence[Tensor]
) -> dict[str, Tensor]:
    """∂term/∂ẑ0 of each term, of the shape of `z0`; the graphs are freed.

    Through φ and θ_F first, down to ẑ0 and θ_R's features; then, θ_F's activations gone, through θ_R.
    """
    last = list(terms)[-1]
    at: dict[str, list[Tensor]] = {}
    for name in list(terms):
        leaves = [z0, *real_leaves]
        at[name] = list(torch.autograd.grad(terms.pop(name), leaves, retain_graph=name != last, materialize_grads=True))
    gradients = {}
    for name, (at_z0, *at_real) in at.items():
        if real_s and name != "dmd":
            at_z0 = at_z0 + torch.autograd.grad(real_s, z0, at_real, retain_graph=name != last)[0]
        gradients[name] = at_z0
    return gradients


def _mean(logits: Sequence[Tensor]) -> Tensor:
    return torch.stack([logit.detach().mean() for logit in logits]).mean()

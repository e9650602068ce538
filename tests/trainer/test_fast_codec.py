"""`--stage fast_decoder` and `--stage lr_encoder`: their losses against float64, their samples, their model folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from common.errors import UserError
from common.seeding import seeded_noise
from datagen.dataset.loader import Batch
from pipeline.latent_codec import FastCodec
from pipeline.model.config import ModelConfig
from pipeline.model.fast_codec import decode_streaming
from pipeline.model.prompts import placeholder_cache
from pipeline.model.small_vae import SmallVideoVAE
from pipeline.model.tiny_vae import TinyVideoVAE
from pipeline.model.transformer import VSRTransformer
from pipeline.model.vae import decode_latents, to_pixels
from pipeline.vsr_pipeline import VSRPipeline, open_pipeline
from tests.trainer.presets import ADAM, TRANSFORMER
from tests.trainer.ranks import run_on_ranks
from trainer.engine.config import DeepSpeedConfig
from trainer.engine.process_group import World
from trainer.stages.fast_codec import networks
from trainer.stages.fast_codec.config import FastDecoderConfig, LrEncoderConfig
from trainer.stages.fast_codec.decoder import FastDecoderStage
from trainer.stages.fast_codec.encoder import LrEncoderStage
from trainer.stages.fast_codec.spec import FAST_DECODER, LR_ENCODER
from trainer.stages.losses import grid_loss, multiscale_gradient_loss
from trainer.stages.stage import NetworkSpec, StageSetup

MODEL = ModelConfig(transformer=TRANSFORMER, vae="none", prompts="none")
SMALL = {"shape": {"dims": (8, 8, 6, 4), "blocks": (1, 1, 0)}, "frames": 5, "side": 16}
CHANNELS = TRANSFORMER["latent_channels"]


def batch(keys: list[str]) -> Batch:
    """Latents of 5 x 32 x 32 pixels, and the clips."""
    tensors: dict[str, Tensor] = {}
    for name in ("z_hr", "z_lr"):
        tensors[name] = torch.stack([seeded_noise((CHANNELS, 2, 4, 4), name, key) for key in keys])
    for name, side in (("hr", 32), ("lr", 8)):
        clips = [(60 * seeded_noise((5, side, side, 3), name, key) + 128).clamp(0, 255) for key in keys]
        tensors[name] = torch.stack(clips).to(torch.uint8)
    return Batch(keys, tensors, [{"caption": ""} for _ in keys])


def decoder_stage(accumulation: int = 1, zero_stage: int = 1, **changes: Any) -> FastDecoderStage:
    config = FastDecoderConfig(**(SMALL | changes))

    def transformer_of(network: NetworkSpec) -> Any:
        torch.manual_seed(1)
        if network.name == "full_decoder":
            return TinyVideoVAE(z_dim=CHANNELS, hidden_dim=8, num_blocks=1)
        if network.load is not None:
            return network.load(None, MODEL, config, 7)
        return VSRTransformer(**TRANSFORMER)

    modules = FAST_DECODER.modules(config, transformer_of, 0)
    return FastDecoderStage(setup(FAST_DECODER, config, modules, accumulation, zero_stage))


def setup(spec: Any, config: Any, modules: dict[str, Any], accumulation: int = 1, zero_stage: int = 1) -> StageSetup:
    engine = DeepSpeedConfig(
        zero_stage=zero_stage, precision="fp32", gradient_accumulation=accumulation, persistence_threshold=0
    )
    return StageSetup(spec, config, modules, lambda name: engine, lambda c: torch.zeros(len(c), 4, 8), seed=5)


def reconstruction(y: Tensor, x: Tensor) -> Tensor:
    return (y - x).square().mean() + 0.1 * (y - x).abs().mean()


@pytest.mark.parametrize("step", [0, 3])
def test_a_decoder_step_is_the_written_loss(world: World, step: int) -> None:
    weights = {"full_decoder_weight": 0.5, "grid_weight": 0.3, "adversarial_weight": 0.2, "adversarial_from_step": 2}
    stage, clips = decoder_stage(student_fraction=0.0, **weights), batch(["a", "b", "c"])
    plain = {name: copy.deepcopy(network.module).double() for name, network in stage.networks.items()}
    crop = stage._crop(clips, clips.tensors["z_hr"], step)
    z, low, x = (part.double() for part in crop)
    y = plain["fast_decoder"](z, low)
    terms, error = [], (y - x).transpose(1, 2).flatten(0, 1)
    for scale in range(3):
        small = F.avg_pool2d(error, 2**scale) if scale else error
        terms += [small.diff(dim=-1).abs().mean(), small.diff(dim=-2).abs().mean()]
    full = plain["full_decoder"].vae.decode(z).sample.clamp(-1, 1)
    expected = reconstruction(y, x) + 0.05 * torch.stack(terms).mean() + 0.5 * reconstruction(y, full)
    expected = expected + 0.3 * grid_loss(y, x, 8)
    d_hr, d_s = plain["discriminator"](x, low), plain["discriminator"](y, low)
    if step >= 2:
        expected = expected - 0.2 * d_s.mean()
    values = stage.train_step(step, [clips])
    assert values["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert ("loss_adversarial" in values) == (step >= 2)
    hinge = F.relu(1 - d_hr).mean() + F.relu(1 + d_s).mean()
    assert values["loss_discriminator"] == pytest.approx(hinge.item(), rel=1e-4)


def test_a_penalised_relativistic_discriminator(world: World) -> None:
    weights = {"r1_weight": 3.0, "r2_weight": 2.0, "perturbation_sigma": 0.05, "gan_loss": "relativistic"}
    stage, clips = decoder_stage(student_fraction=0.0, adversarial_weight=0.2, **weights), batch(["a", "b", "c"])
    plain = {name: copy.deepcopy(network.module).double() for name, network in stage.networks.items()}
    z, low, x = (part.double() for part in stage._crop(clips, clips.tensors["z_hr"], 3))
    y = plain["fast_decoder"](z, low)
    draws, d = stage.draws(3, clips), plain["discriminator"].requires_grad_(True)
    d_hr, d_s = d(x, low), d(y, low)
    r1 = (d_hr - d(x + 0.05 * draws.noise("r1", x.float()).double(), low)).square().mean()
    r2 = (d_s - d(y + 0.05 * draws.noise("r2", x.float()).double(), low)).square().mean()
    loss = F.softplus(d_s - d_hr).mean() + 3 * r1 + 2 * r2
    gradient = torch.autograd.grad(loss, list(d.parameters()))
    values = stage.train_step(3, [clips])
    assert values["loss_adversarial"] == pytest.approx(F.softplus(d_hr - d_s).mean().item(), rel=1e-4)
    found = sum(values[f"loss_{name}"] * weight for name, weight in (("discriminator", 1), ("r1", 3), ("r2", 2)))
    assert found == pytest.approx(loss.item(), rel=1e-4)
    norm = torch.stack([part.norm() for part in gradient]).norm()
    assert values["gradient_norm_discriminator"] == pytest.approx(norm.item(), rel=1e-3)
    with pytest.raises(ValidationError, match="set adversarial_weight above 0"):
        FastDecoderConfig(r1_weight=1.0)


def test_a_trained_student_descends_the_same_loss(world: World) -> None:
    """Two micro-batches; the gradients of both networks beside one autograd graph of a float64 copy."""
    parts = [batch(["a", "b"]), batch(["c", "d"])]
    stage = decoder_stage(student_fraction=0.7, student_optimizer=ADAM, accumulation=2)
    torch.manual_seed(3)
    for network in stage.networks.values():  # as it begins, the student's last layer is zero, and all before it
        network._set_masters([m + 0.05 * torch.randn_like(m) for m in (f.master for f in network.fragments)])
    plain = {name: copy.deepcopy(network.module).double() for name, network in stage.networks.items()}
    for module in plain.values():
        module.requires_grad_(True)
    for clips in parts:
        draws = stage.draws(3, clips)
        noise, z_lr = draws.noise("generator", clips.tensors["z_hr"]).double(), clips.tensors["z_lr"].double()
        ones, prompt = torch.ones(2, dtype=torch.float64), torch.zeros(2, 4, 8, dtype=torch.float64)
        z0 = noise - plain["student"](noise, ones, z_lr, prompt).velocity
        taken = (draws.uniform("student") < 0.7).view(-1, 1, 1, 1, 1)
        crop = stage._crop(clips, torch.where(taken, z0, clips.tensors["z_hr"].double()), 3)
        y, x = plain["fast_decoder"](crop.z, crop.low_resolution.double()), crop.hr.double()
        (loss := reconstruction(y, x) + 0.05 * multiscale_gradient_loss(y, x, 3))
        (loss / 2).backward()
    values = stage.train_step(3, parts)
    for name, module in plain.items():
        norm = torch.stack([p.grad.square().sum() for p in module.parameters() if p.grad is not None]).sum().sqrt()
        assert norm > 1e-4
        assert values[f"gradient_norm_{name}"] == pytest.approx(norm.item(), rel=1e-3)
    with pytest.raises(ValueError, match="no student is decoded"):
        FastDecoderConfig(student_fraction=0, student_optimizer=ADAM)


def joint_steps(world: World, *, zero_stage: int) -> dict[str, Any]:
    """Three steps of student, decoder and discriminator on four clips, shared by the ranks."""
    stage = decoder_stage(
        zero_stage=zero_stage, student_fraction=0.7, student_optimizer=ADAM, adversarial_weight=0.1, optimizer=ADAM
    )
    mine = [key for number, key in enumerate("abcd") if number * world.size // 4 == world.rank]
    return {"logs": [stage.train_step(step, [batch(mine)]) for step in range(3)]}


@pytest.mark.distributed
def test_two_ranks_at_zero_3_are_one_rank(world: World) -> None:
    for logs in run_on_ranks(f"{__name__}:joint_steps", 2, zero_stage=3):
        alone = joint_steps(world, zero_stage=1)["logs"]
        for mine, theirs in zip(logs["logs"], alone, strict=True):
            for values in (mine, theirs):
                # The hinge loss leaves open what is added to all logits alike: rounding decides (docs/parity.md).
                values["margin"] = values.pop("d_hr") - values.pop("d_s")
                assert values.pop("loss_adversarial") != 0
            assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_the_discriminator_sees_what_lr_lacks() -> None:
    discriminator, low = networks.PixelDiscriminator(8).double(), seeded_noise((1, 3, 2, 4, 5), "low").double()
    x = seeded_noise((1, 3, 2, 16, 20), "x").double()
    logits = discriminator(x, low)
    assert logits.shape == (1, 1, 2, 4, 5)
    torch.testing.assert_close(discriminator(x + 0.5, low + 0.5), logits)
    frames = [F.interpolate(low[:, :, frame], scale_factor=4, mode="bicubic") for frame in range(2)]
    torch.testing.assert_close(discriminator(x + torch.stack(frames, 2), 2 * low), discriminator(x, low))


def test_the_student_is_decoded_in_its_share_of_the_samples(world: World) -> None:
    clips = batch([str(number) for number in range(40)])
    stage = decoder_stage(student_fraction=0.5)
    assert set(stage.networks) == {"fast_decoder", "student"}
    z, own = stage._latents(0, clips), stage._student_latents(0, clips, stage.student.frozen)  # type: ignore[union-attr]
    taken = [torch.equal(a, b) for a, b in zip(z, own, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(z, clips.tensors["z_hr"], strict=True)]
    assert all(a != b for a, b in zip(taken, kept, strict=True)) and 10 < sum(taken) < 30
    noise = stage.draws(0, clips).noise("generator", z)
    velocity = stage.student.module(noise, torch.ones(40), clips.tensors["z_lr"], torch.zeros(40, 4, 8)).velocity  # type: ignore[union-attr]
    torch.testing.assert_close(own, noise - velocity)
    assert set(stage.previews(clips)) == {"fast_decoder", "fast_decoder_of_student"}


def test_crops_of_latent_lr_and_hr_are_of_the_same_place(world: World) -> None:
    stage, clips = decoder_stage(student_fraction=0.0), batch(["a", "b"])
    rows = torch.arange(32).view(1, 1, 32, 1, 1).expand(2, 5, 32, 32, 3)
    clips.tensors |= {"hr": rows.to(torch.uint8), "lr": (rows[:, :, ::4, ::4] // 4).to(torch.uint8)}
    clips.tensors["z_hr"] = torch.arange(4.0).view(1, 1, 1, 4, 1).expand(2, CHANNELS, 2, 4, 4)
    crop = stage._crop(clips, clips.tensors["z_hr"], 4)
    assert [part.shape[2:] for part in crop] == [(2, 2, 2), (5, 4, 4), (5, 16, 16)]
    first = crop.z[:, 0, 0, 0, 0]
    torch.testing.assert_close(first * 8, (crop.hr[:, 0, 0, 0, 0] + 1) * 127.5)
    torch.testing.assert_close(first * 2, (crop.low_resolution[:, 0, 0, 0, 0] + 1) * 127.5)
    middle = to_pixels(clips.tensors["hr"][0, :, 8:24, 8:24])
    assert torch.equal(stage.target(clips)[0], middle)
    with pytest.raises(UserError, match=r"trainer\.fast_decoder.*lower frames or side"):
        decoder_stage(side=64, student_fraction=0.0)._crop(clips, clips.tensors["z_hr"], 0)


def test_lpips_is_its_published_formula() -> None:
    """Features normalised over channels, squared differences weighed by the heads, means over places, layers added."""
    torch.manual_seed(0)
    lpips = networks.Perceptual().double().eval()
    a, b = (seeded_noise((1, 3, 2, 64, 64), name).clamp(-1, 1).double() for name in "ab")
    expected, inner = [], lpips.network
    shift, scale = (torch.tensor(values).view(1, 3, 1, 1) for values in ((-0.03, -0.088, -0.188), (0.458, 0.448, 0.45)))
    for frame in range(2):
        features = [inner.net((clip[:, :, frame] - shift) / scale) for clip in (a, b)]
        total = torch.zeros(())
        for layer, pair in enumerate(zip(*features, strict=True)):
            one, two = (f / (f.square().sum(1, keepdim=True) + 1e-8).sqrt() for f in pair)
            weights = inner.lins[layer].model[-1].weight
            total = total + ((one - two).square() * weights.view(1, -1, 1, 1)).sum(1).mean()
        expected.append(total)
    assert lpips(a, b).item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)


def test_lpips_without_its_weights_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("metrics.weights.search_folders", lambda first=None: [tmp_path] * 2)
    config = FastDecoderConfig(perceptual="lpips")
    assert config.with_lpips
    with pytest.raises(UserError, match="alexnet"):
        networks.load_perceptual(None, MODEL, config, 0)


def encoder_stage(**changes: Any) -> LrEncoderStage:
    config = LrEncoderConfig(shape={"dim": 8, "blocks": 1}, **changes)
    return LrEncoderStage(setup(LR_ENCODER, config, {"lr_encoder": networks.load_lr_encoder(None, MODEL, config, 0)}))


def test_an_encoder_step_is_the_written_loss(world: World) -> None:
    stage, clips = encoder_stage(), batch(["a", "b"])
    plain = copy.deepcopy(stage.lr_encoder.module).double()
    low = torch.stack([to_pixels(clip) for clip in clips.tensors["lr"]]).double()
    expected = reconstruction(plain(low), clips.tensors["z_lr"].double())
    assert stage.train_step(0, [clips])["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(stage.target(clips), clips.tensors["z_lr"])


def test_both_learn(world: World) -> None:
    clips, quick = batch(["a"]), {"optimizer": ADAM, "linear_learning_rate": 3e-3}
    decoder, encoder = decoder_stage(student_fraction=0.0, **quick), encoder_stage(**quick)
    for stage, name in ((decoder, "loss_pixels"), (encoder, "loss")):
        losses = [stage.train_step(0, [clips])[name] for _ in range(25)]
        assert losses[-1] < 0.9 * losses[0]


def test_a_decoder_for_a_small_vae_begins_as_its_linear_path(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = SmallVideoVAE(z_dim=CHANNELS, encoder_dims=(4, 4, 4), decoder_dims=(4, 4, 4, 4), decoder_blocks=(0, 0, 0))
    vae.register_to_config(latents_mean=[0.5, -1.0, 2.0, 0.0], latents_std=[2.0, 0.5, 1.0, 3.0])
    vae.save_pretrained(tmp_path)
    model = MODEL.model_copy(update={"vae": tmp_path})
    decoder = networks.load_fast_decoder(None, model, FastDecoderConfig(**SMALL), 0)
    z = seeded_noise((1, CHANNELS, 3, 4, 5), "z")
    decoded = decode_streaming(decoder, z, torch.zeros(1, 3, 9, 8, 10))
    torch.testing.assert_close(decoded, decode_latents(vae, z), rtol=0, atol=1e-5)


def test_each_adds_its_network_to_the_model_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae, prompts = TinyVideoVAE(z_dim=CHANNELS, hidden_dim=8, num_blocks=1), placeholder_cache(8, 4)
    VSRPipeline(VSRTransformer(**TRANSFORMER), vae, prompts).save_pretrained(tmp_path / "model")
    decoder_config = FastDecoderConfig(**SMALL)
    decoder = networks.load_fast_decoder(tmp_path / "model", MODEL, decoder_config, 0)
    encoder = networks.load_lr_encoder(None, MODEL, LrEncoderConfig(shape={"dim": 8, "blocks": 1}), 0)
    for folder, name, network, init in (
        ("one", "fast_decoder", decoder, "model"),
        ("two", "lr_encoder", encoder, "one"),
    ):
        networks.export(tmp_path / folder, {name: (network, network.state_dict())}, tmp_path / init)
    student = VSRTransformer(**TRANSFORMER)
    state = {name: torch.full_like(value, 0.5) for name, value in student.state_dict().items()}
    trained = {"fast_decoder": (decoder, decoder.state_dict()), "student": (student, state)}
    networks.export(tmp_path / "three", trained, tmp_path / "two")
    three = open_pipeline(tmp_path / "three")
    assert three.lr_encoder is not None and all((p == 0.5).all() for p in three.transformer.parameters())
    opened = open_pipeline(tmp_path / "two").codec("fast")
    assert isinstance(opened, FastCodec)
    assert all(torch.equal(a, b) for a, b in zip(opened.decoder.parameters(), decoder.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(opened.encoder.parameters(), encoder.parameters(), strict=True))
    for part in ("transformer", "vae", "prompts"):
        file = f"{part}/diffusion_pytorch_model.safetensors"
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()
    again = networks.load_fast_decoder(tmp_path / "two", MODEL, FastDecoderConfig(), 0)
    assert again.config.dims == [8, 8, 6, 4], "what the folder holds is trained on"
    wider = ModelConfig(transformer=TRANSFORMER | {"latent_channels": 6}, vae="none", prompts="none")
    with pytest.raises(UserError, match="4 latent channels"):
        networks.load_fast_decoder(tmp_path / "two", wider, decoder_config, 0)
    with pytest.raises(UserError, match=r"model_index\.json is missing"):
        networks.load_lr_encoder(tmp_path / "two" / "vae", MODEL, LrEncoderConfig(), 0)

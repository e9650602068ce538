"""The DiT: diffusers' names and shapes, diffusers' numbers, features as outputs."""

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from common.errors import UserError
from pipeline.model.config import TransformerConfig
from pipeline.model.load_weights import ORIGINAL_NAMES, load_transformer, rename_original
from pipeline.model.low_resolution_skip import normalised_residual, skip_velocity
from pipeline.model.transformer import VSRTransformer, tapped_layers
from tests.private_memory import private_kib

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "ffn_dim": 64,
    "freq_dim": 32,
    "text_dim": 8,
    "num_layers": 3,
}


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    z_t, z_lr = torch.randn(2, 2, 4, 3, 4, 6, generator=generator).unbind(0)
    return z_t, torch.tensor([0.3, 1.0]), z_lr, torch.randn(2, 5, 8, generator=generator)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VSRTransformer(latent_channels=4, **TINY).eval()


def test_full_size_has_the_public_names_and_shapes_but_for_the_patch_embedding():
    with torch.device("meta"):
        ours = VSRTransformer(**TransformerConfig().model_dump())
        theirs = WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=4096,
            freq_dim=256, ffn_dim=8960, num_layers=30,
        )  # fmt: skip
    shapes = {name: tuple(p.shape) for name, p in ours.named_parameters()}
    public = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    assert shapes.pop("patch_embedding.weight") == (1536, 32, 1, 2, 2)
    assert public.pop("patch_embedding.weight") == (1536, 16, 1, 2, 2)
    assert shapes == public
    assert 1.3e9 <= sum(p.numel() for p in ours.parameters()) <= 1.5e9


def test_with_a_zero_low_resolution_half_it_is_diffusers_model(model, inputs, tmp_path):
    z_t, t, z_lr, prompt = inputs
    torch.manual_seed(1)
    public = WanTransformer3DModel(in_channels=4, out_channels=4, **TINY).eval()
    public.save_pretrained(tmp_path / "transformer")
    config = TransformerConfig(latent_channels=4, **TINY)
    widened = load_transformer(tmp_path, config).eval()
    with torch.no_grad():
        expected = public(z_t, t * 1000, prompt).sample
        assert torch.allclose(widened(z_t, t, z_lr, prompt).velocity, expected, atol=1e-6)
        assert torch.allclose(widened(z_t, t, 2 * z_lr, prompt).velocity, expected, atol=1e-6)


def test_early_exit_gives_the_features_of_the_full_pass(model, inputs):
    with torch.no_grad():
        full = model(*inputs, feature_layers=(1, 2))
        early = model(*inputs, feature_layers=(1, 2), features_only=True)
    assert early.velocity is None and full.velocity.shape == inputs[0].shape
    assert len(full.features) == 2
    for a, b in zip(full.features, early.features, strict=True):
        assert a.shape == (2, 3 * 2 * 3, 48) and torch.equal(a, b)


def test_early_exit_runs_no_block_after_the_last_tap(model, inputs):
    ran = []
    handles = [block.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, block in enumerate(model.blocks, 1)]
    model(*inputs, feature_layers=(1,), features_only=True)
    for handle in handles:
        handle.remove()
    assert ran == [1]


def test_the_skip_is_the_posterior_mean_of_a_gaussian():
    """Against regression on 400,000 draws of z0 = z_LR + σ·n, z_t = (1 - t)·z0 + t·ε."""
    rng, sigma = np.random.default_rng(0), 0.25
    z_lr, difference, noise = rng.normal(size=400_000), sigma * rng.normal(size=400_000), rng.normal(size=400_000)
    for t in (0.05, 0.2, 0.5, 1.0):
        z_t = (1 - t) * (z_lr + difference) + t * noise
        seen = z_t - (1 - t) * z_lr
        expected = z_lr + seen * (seen @ difference) / (seen @ seen)
        v = skip_velocity(*(torch.from_numpy(np.asarray(x)) for x in (z_t, t, z_lr)), sigma).numpy()
        assert np.abs(z_t - t * v - expected).mean() < 0.002
        left = noise - (z_lr + difference) - v
        assert left.std() < 1.01 * np.sqrt(1 + sigma**2)


def test_each_channel_has_its_own_deviation():
    z_t, z_lr = torch.randn(2, 2, 3, 1, 2, 2, dtype=torch.float64).unbind(0)
    t, deviations = torch.rand(2, 1, 1, 1, 1, dtype=torch.float64), [0.1, 0.5, 2.0]
    together = skip_velocity(z_t, t, z_lr, torch.tensor(deviations, dtype=torch.float64).view(1, 3, 1, 1, 1))
    apart = [skip_velocity(z_t[:, [c]], t, z_lr[:, [c]], sigma) for c, sigma in enumerate(deviations)]
    assert torch.allclose(together, torch.cat(apart, 1), rtol=1e-12)


def test_the_predictor_takes_the_place_of_z_lr_in_the_skip(inputs):
    from pipeline.model.load_weights import build_transformer

    z_t, t, z_lr, prompt = inputs
    config = TransformerConfig(
        latent_channels=4, low_resolution_skip=True, low_resolution_deviation=0.3, low_resolution_predictor=True, **TINY
    )
    network = build_transformer(config)
    with torch.no_grad():
        network.predictor.filter.weight.normal_(std=0.2)
        network.predictor.log_deviation.copy_(torch.tensor([0.1, 0.2, 0.5, 1.0]).log())
    padded = torch.nn.functional.pad(z_lr, (1, 1, 1, 1, 0, 0), mode="replicate")
    expected = z_lr + torch.nn.functional.conv3d(padded, network.predictor.filter.weight.unsqueeze(2))
    sigma = torch.tensor([0.1, 0.2, 0.5, 1.0]).view(1, 4, 1, 1, 1)
    v = network(z_t, t, z_lr, prompt).velocity
    assert torch.allclose(v, skip_velocity(z_t, t.view(-1, 1, 1, 1, 1), expected, sigma), atol=1e-5)
    v.square().mean().backward()
    assert network.predictor.filter.weight.grad.abs().sum() > 0
    assert network.predictor.log_deviation.grad.abs().min() > 0
    half = network.to(torch.bfloat16)(z_t, t, z_lr, prompt).velocity
    assert torch.allclose(half.float(), v, atol=0.1)


def test_the_residual_input_has_unit_size_at_every_time():
    """Against float64 statistics: z0 - mean of deviation σ leaves ε at t = 1, (z0 - mean)/σ at t = 0."""
    generator = np.random.default_rng(0)
    mean, noise = generator.normal(size=(2, 1, 1, 1, 200, 200))
    sigma = 0.3
    z0 = mean + sigma * generator.normal(size=mean.shape)
    for time in (0.0, 0.1, 0.5, 1.0):
        z_t = (1 - time) * z0 + time * noise
        t = torch.full((1, 1, 1, 1, 1), time, dtype=torch.float64)
        shown = normalised_residual(torch.from_numpy(z_t), t, torch.from_numpy(mean), sigma).numpy()
        assert shown.std() == pytest.approx(1, abs=0.02)
        if time in (0.0, 1.0):
            assert np.allclose(shown, noise if time else (z0 - mean) / sigma)


def test_the_network_is_shown_the_residual_of_its_own_prediction(inputs):
    from pipeline.model.load_weights import build_transformer

    z_t, t, z_lr, prompt = inputs
    skip = {"low_resolution_skip": True, "low_resolution_deviation": 0.3, "low_resolution_predictor": True}
    config = TransformerConfig(latent_channels=4, predictor_blocks=1, predictor_width=8, **skip, **TINY)
    torch.manual_seed(0)
    plain = build_transformer(config)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    shown = build_transformer(config.model_copy(update={"residual_input": True}))
    shown.load_state_dict(plain.state_dict())
    time, (mean, sigma) = t.view(-1, 1, 1, 1, 1), plain.predictor(z_lr)
    residual = normalised_residual(z_t, time, mean, sigma)
    skipped = [skip_velocity(z, time, mean, sigma) for z in (z_t, residual)]
    expected = plain(residual, t, z_lr, prompt).velocity - skipped[1] + skipped[0]
    assert torch.allclose(shown(z_t, t, z_lr, prompt).velocity, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"predictor_blocks": 2}, "predictor_blocks means nothing without low_resolution_predictor"),
        ({"residual_input": True}, "residual_input needs a low_resolution_deviation above 0"),
    ],
    ids=str,
)
def test_parts_of_the_skip_that_lack_another_are_refused(fields, fault):
    with pytest.raises(ValueError, match=fault):
        TransformerConfig(low_resolution_skip=True, **fields)


@pytest.mark.parametrize(("deviation", "predictor"), [(0.0, False), (0.25, False), (0.25, True)])
def test_low_resolution_skip_starts_as_z_lr(inputs, deviation, predictor):
    from pipeline.model.load_weights import build_transformer
    from pipeline.sampling import one_step

    z_t, _, z_lr, prompt = inputs
    skip = {"low_resolution_deviation": deviation, "low_resolution_predictor": predictor}
    network = build_transformer(TransformerConfig(latent_channels=4, low_resolution_skip=True, **skip, **TINY))
    z0 = one_step(lambda *x: network(*x).velocity, z_t, z_lr, prompt)
    assert torch.allclose(z0, z_lr, atol=1e-6)


@pytest.mark.parametrize(("depth", "layers"), [(30, (9, 18, 27)), (10, (3, 6, 9)), (6, (2, 4, 5)), (1, (1,))])
def test_taps_follow_the_depth(depth, layers):
    assert tapped_layers(depth) == layers


@pytest.mark.parametrize(
    "bad", [{"feature_layers": (2, 1)}, {"feature_layers": (4,)}, {"features_only": True}], ids=str
)
def test_wrong_taps_are_refused(model, inputs, bad):
    with pytest.raises(ValueError, match="feature"):
        model(*inputs, **bad)


def test_sizes_must_fit(model, inputs):
    z_t, t, z_lr, prompt = inputs
    with pytest.raises(ValueError, match="patch size"):
        model(z_t[..., :5], t, z_lr[..., :5], prompt)
    with pytest.raises(ValueError, match="must be equal"):
        model(z_t, t, z_lr[:, :2], prompt)


def test_original_layout_loads_to_the_same_weights(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(2)
    public = WanTransformer3DModel(in_channels=4, out_channels=4, **TINY)
    original = {to_original(name): tensor.contiguous() for name, tensor in public.state_dict().items()}
    assert all(rename_original(to_original(name)) == name for name in public.state_dict())
    save_file(original, tmp_path / "wan.safetensors")
    loaded = load_transformer(tmp_path / "wan.safetensors", TransformerConfig(latent_channels=4, **TINY))
    for name, tensor in public.state_dict().items():
        if name != "patch_embedding.weight":
            assert torch.equal(loaded.state_dict()[name], tensor), name
    assert len(ORIGINAL_NAMES) > 10


@pytest.mark.parametrize(("stored", "dtype"), [("float32", torch.float32), ("bfloat16", None)])
def test_weights_are_mapped_not_copied(tmp_path, stored, dtype):
    """So many processes of a machine share one copy; the result is the same as after a copy."""
    config = TransformerConfig(latent_channels=4, **(TINY | {"ffn_dim": 2**16}))
    model = VSRTransformer(**config.model_dump()).to(getattr(torch, stored))
    model.save_pretrained(tmp_path)
    before = private_kib()
    mapped = load_transformer(tmp_path, config, dtype=dtype)
    assert all(p.sum().isfinite() for p in mapped.parameters())  # all of them have been read
    size_kib = sum(p.nbytes for p in mapped.parameters()) / 1024
    assert private_kib() - before < size_kib / 2 and size_kib > 2**15
    for (name, parameter), (other, value) in zip(mapped.named_parameters(), model.named_parameters(), strict=True):
        assert name == other and torch.equal(parameter, value) and parameter.requires_grad
    for (name, table), (other, value) in zip(mapped.named_buffers(), model.named_buffers(), strict=True):
        assert name == other and table.shape == value.shape and table.device.type == "cpu"


def test_weights_of_another_shape_are_refused_by_name(tmp_path):
    public = WanTransformer3DModel(in_channels=4, out_channels=4, **TINY)
    public.save_pretrained(tmp_path / "transformer")
    with pytest.raises(UserError, match=r"ffn\.net\.0\.proj\.weight is \(64, 48\), not \(96, 48\)"):
        load_transformer(tmp_path, TransformerConfig(latent_channels=4, **(TINY | {"ffn_dim": 96})))
    with pytest.raises(UserError, match="another VAE"):
        load_transformer(tmp_path, TransformerConfig(latent_channels=6, **TINY))
    with pytest.raises(UserError, match="no model folder"):
        load_transformer(tmp_path / "nowhere", TransformerConfig())


def to_original(name: str) -> str:
    """The published Wan2.1 spelling, written down independently of pipeline/model/load_weights.py."""
    if not name.startswith("blocks."):
        for ours, theirs in {
            "condition_embedder.time_embedder.linear_1": "time_embedding.0",
            "condition_embedder.time_embedder.linear_2": "time_embedding.2",
            "condition_embedder.text_embedder.linear_1": "text_embedding.0",
            "condition_embedder.text_embedder.linear_2": "text_embedding.2",
            "condition_embedder.time_proj": "time_projection.1",
            "scale_shift_table": "head.modulation",
            "proj_out": "head.head",
        }.items():
            if name.startswith(ours):
                return name.replace(ours, theirs)
        return name
    _, number, part = name.split(".", 2)
    part = part.replace("scale_shift_table", "modulation").replace("norm2.", "norm3.")
    part = part.replace("ffn.net.0.proj", "ffn.0").replace("ffn.net.2", "ffn.2")
    for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn")):
        for projection in "qkv":
            part = part.replace(f"{ours}.to_{projection}.", f"{theirs}.{projection}.")
        part = part.replace(f"{ours}.to_out.0.", f"{theirs}.o.").replace(f"{ours}.norm_", f"{theirs}.norm_")
    return f"blocks.{number}.{part}"

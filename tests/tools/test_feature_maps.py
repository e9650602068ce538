"""Feature maps: PCA against NumPy's SVD, the fake score out of a checkpoint, and the command."""

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save

from common.errors import UserError
from common.storage import open_folder
from datagen.dataset.shard_format import Sample, write_manifest, write_shard
from pipeline.model.prompts import placeholder_cache
from pipeline.model.tiny_vae import TinyVideoVAE
from pipeline.model.transformer import VSRTransformer
from pipeline.vsr_pipeline import VSRPipeline
from tools.feature_maps import load_fake_score, main, principal_components, tapped_features
from trainer.engine.zero_shards import Fragment, save_fragments

SHAPE = (8, 2, 6, 6)


def network(seed: int) -> VSRTransformer:
    torch.manual_seed(seed)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32}
    return VSRTransformer(latent_channels=SHAPE[0], num_layers=4, **sizes).eval()


def save_critic(folder, model):
    """Two ranks' files of a checkpoint: each parameter is cut somewhere."""
    (folder / "critic").mkdir(parents=True)
    for rank in range(2):
        fragments = []
        for name, parameter in model.named_parameters():
            cut = parameter.numel() // 3
            start, end = (0, cut) if rank == 0 else (cut, parameter.numel())
            if end > start:
                flat = parameter.detach().reshape(-1)
                fragments.append(Fragment(f"transformer.{name}", start, end - start, flat, start))
        columns = {"master": [fragment.master for fragment in fragments]}
        path = folder / "critic" / f"rank-{rank:05d}.safetensors"
        save_fragments(path, fragments, columns, {"world_size": 2})


def test_components_are_those_of_the_singular_value_decomposition():
    tokens = np.random.default_rng(0).normal(size=(50, 7)) * np.arange(1, 8)
    found, shares = principal_components(tokens)
    centred = tokens - tokens.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    assert np.allclose(np.abs(found), np.abs(u[:, :3] * s[:3]), atol=1e-9)
    assert np.allclose(shares, (s**2 / (s**2).sum())[:3])


def test_the_fake_score_comes_out_of_a_checkpoint_of_any_number_of_ranks(tmp_path):
    fake = network(1)
    save_critic(tmp_path / "step-1", fake)
    loaded = load_fake_score(tmp_path / "step-1", network(0))
    for (name, ours), (_, theirs) in zip(loaded.named_parameters(), fake.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    with pytest.raises(UserError, match="is no model folder"):
        load_fake_score(tmp_path, network(0))


def test_features_are_those_of_the_network_one_norm_per_token():
    model, generator = network(0), torch.Generator().manual_seed(0)
    z_t, z_lr = (torch.randn(1, *SHAPE, generator=generator) for _ in range(2))
    prompt = torch.zeros(1, 4, 16)
    (found,) = tapped_features(model, z_t, 0.5, z_lr, prompt, (2,))
    with torch.no_grad():
        expected = model(z_t, torch.tensor([0.5]), z_lr, prompt, (2,)).features[0][0].double().numpy()
    assert found.shape == (2 * 3 * 3, 24)
    centred = expected - expected.mean(1, keepdims=True)
    assert np.allclose(found, centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5), atol=1e-4)


def test_the_command_draws_the_figure(tmp_path, monkeypatch, capsys):
    real = network(0)
    pipeline = VSRPipeline(
        transformer=real,
        vae=TinyVideoVAE(z_dim=SHAPE[0], hidden_dim=8, num_blocks=1),
        prompts=placeholder_cache(text_dim=16, max_length=4),
    )
    pipeline.save_pretrained(tmp_path / "model")
    save_critic(tmp_path / "step-1", network(1))
    latents = {name: torch.randn(SHAPE).bfloat16() for name in ("z_hr", "z_lr")}
    sample = Sample("clip", {"latents.safetensors": save(latents), "json": b'{"caption": "high quality video"}'})
    write_manifest(open_folder(tmp_path / "data"), "clips", [write_shard(tmp_path / "data", 0, [sample])])
    arguments = ["--model", "model", "--real", "model", "--fake", "step-1", "--data", "data", "--output", "out.png"]
    paths = [text if text.startswith("--") else str(tmp_path / text) for text in arguments]
    monkeypatch.setattr("sys.argv", ["feature_maps", *paths, "--device", "cpu"])
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    main()
    assert "without t-SNE" in capsys.readouterr().out
    assert (tmp_path / "out.png").stat().st_size > 10_000
    monkeypatch.setattr("sys.argv", ["feature_maps", *paths, "--clip", "1"])
    with pytest.raises(UserError, match="--clip 1: the dataset has 1"):
        main()

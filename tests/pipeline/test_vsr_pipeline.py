"""VSRPipeline as a diffusers pipeline, with Wan's VAE; noise that belongs to the video."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from common.errors import UserError
from pipeline.model.prompts import placeholder_cache
from pipeline.model.transformer import VSRTransformer
from pipeline.model.vae import to_frames
from pipeline.video_windows import Windows, upscale_video
from pipeline.vsr_pipeline import VSRPipeline, open_pipeline


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    transformer = VSRTransformer(
        latent_channels=4, num_attention_heads=2, attention_head_dim=24, ffn_dim=64, freq_dim=32, text_dim=8,
        num_layers=1,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    return VSRPipeline(transformer, vae, placeholder_cache(8, 4), num_inference_steps=2)


def clip(count: int = 5, height: int = 16, width: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_folder_holds_no_pickle_and_opens_to_the_same_model(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"model_index.json", "config.json", "diffusion_pytorch_model.safetensors"}
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["pipeline.model.transformer", "VSRTransformer"]
    assert index["vae"] == ["diffusers", "AutoencoderKLWan"]
    opened = open_pipeline(tmp_path)
    assert opened.config.num_inference_steps == 2
    result = opened(clip())
    assert result.dit_evaluations == 2 and set(result.seconds) == {
        "upsample",
        "encode",
        "transformer",
        "decode",
        "colour",
    }
    assert np.array_equal(result.frames, pipeline(clip()).frames)


def test_an_incomplete_folder_is_refused_by_part(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"vae/ holds no \.safetensors"):
        open_pipeline(tmp_path)


def test_half_precision_gives_nearly_the_same_frames(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    half = open_pipeline(tmp_path, dtype=torch.bfloat16)
    assert half.transformer.dtype == half.vae.dtype == torch.bfloat16
    difference = half(clip()).frames.astype(int) - pipeline(clip()).frames
    assert np.abs(difference).mean() < 8


def test_ten_bits_are_finer_than_eight(pipeline):
    eight, ten = pipeline(clip()).frames, pipeline(clip(), bit_depth=10).frames
    assert ten.dtype == np.uint16 and ten.max() <= 1023
    assert np.abs(ten / 1023 - eight / 255).max() <= 0.51 / 255 + 0.51 / 1023
    assert len(np.unique(ten)) > len(np.unique(eight))
    assert to_frames(torch.ones(3, 1, 1, 1), 10).numpy().max() == 1023


def test_windows_draw_the_noise_of_their_place_in_the_video(pipeline, monkeypatch):
    """Both windows see the same noise in the latent frames that they share, and another seed sees another."""
    seen = []

    def remember(z_t, t, z_lr, prompt):
        seen.append(z_t.clone())
        return type("Output", (), {"velocity": torch.zeros_like(z_t)})

    monkeypatch.setattr(pipeline.transformer, "forward", remember)
    video = clip(15)
    list(upscale_video([pipeline], iter(video), Windows(9, 1), statistics={}, num_inference_steps=1))
    first, second = seen  # of frames 0…8 and 8…14, the second padded to 8…16
    assert torch.equal(first[:, :, -1], second[:, :, 0])
    assert not torch.equal(first[:, :, 0], second[:, :, 0])
    pipeline(video[8:], num_inference_steps=1, first_frame=8)
    assert torch.equal(seen[2], second)
    pipeline(video[8:], num_inference_steps=1, first_frame=8, fixed_noise=True)
    assert torch.equal(seen[3], first[:, :, :1].expand_as(seen[3])), "that of the video's first frame, everywhere"


def test_what_is_not_a_clip_is_refused(pipeline):
    for wrong in (clip().astype(np.float32), clip()[..., :2], clip()[0], clip()[:0]):
        with pytest.raises(ValueError, match="expected uint8"):
            pipeline(wrong)

"""The fast codec: causal, streamed exactly, in tiles, in half precision, and refused where the model has none."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.live_bytes import LiveBytes
from common.seeding import seeded_noise
from common.video_probe import ffmpeg_binary
from pipeline.latent_codec import FastCodec, FullCodec
from pipeline.memory_estimate import MemoryEstimate
from pipeline.model.fast_codec import (
    FastDecoder,
    LowResolutionEncoder,
    decode_streaming,
    encode_streaming,
    frames_of,
    grouped,
)
from pipeline.model.small_vae import SmallVideoVAE
from pipeline.model.vae import decode_latents
from pipeline.upscale_options import parse_arguments
from pipeline.vsr_pipeline import Tiling, VSRPipeline, open_pipeline


@pytest.fixture(scope="module")
def codec() -> FastCodec:
    torch.manual_seed(0)
    decoder = FastDecoder(z_dim=8, dims=(16, 12, 8, 8), blocks=(2, 1, 1))
    encoder = LowResolutionEncoder(z_dim=8, dim=12, blocks=2)
    for network in (decoder, encoder):
        network.requires_grad_(False).eval()
    return FastCodec(None, encoder, decoder)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def fast_folder(codec: FastCodec, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    full = open_pipeline(model_folder)
    folder = tmp_path_factory.mktemp("fast")
    parts = {"fast_decoder": codec.decoder, "lr_encoder": codec.encoder}
    VSRPipeline(full.transformer, full.vae, full.prompts, **parts).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


def low_resolution(frames: int = 9, height: int = 12, width: int = 16) -> torch.Tensor:
    return seeded_noise((1, 3, frames, height, width), "low", frames).clamp(-1, 1)


def latent(frames: int = 9, height: int = 12, width: int = 16) -> torch.Tensor:
    return seeded_noise((1, 8, (frames - 1) // 4 + 1, height // 2, width // 2), "z", frames)


def test_a_group_holds_its_four_frames_and_the_first_one_four_times() -> None:
    low = low_resolution(5, 4, 6)
    groups = grouped(low, begins=True)
    assert groups.shape == (1, 2, 48, 2, 3)
    cells = groups.unflatten(2, (3, 4, 2, 2))  # colour, frame, row, column
    for frame in range(4):
        assert torch.equal(cells[0, 0, :, frame, 1, 0], low[0, :, 0, 1::2, 0::2])
        assert torch.equal(cells[0, 1, :, frame, 0, 1], low[0, :, 1 + frame, 0::2, 1::2])
    assert torch.equal(grouped(low[:, :, 1:], begins=False), groups[:, 1:])
    assert [frames_of(low, index).shape[2] for index in (0, 1)] == [1, 4]


@pytest.mark.parametrize("size", [1, 2])
def test_streaming_equals_the_whole(codec: FastCodec, size: int) -> None:
    low, z = low_resolution(17), latent(17)
    decoded, encoded = codec.decoder(z, low), codec.encoder(low)
    frames, latents, memory, remembered = [], [], None, None
    for first in range(0, 5, size):
        part = torch.cat([frames_of(low, index) for index in range(first, min(first + size, 5))], dim=2)
        pixels, memory = codec.decoder.continued(z[:, :, first : first + size], part, memory)
        z_lr, remembered = codec.encoder.continued(part, remembered)
        frames.append(pixels)
        latents.append(z_lr)
    torch.testing.assert_close(torch.cat(frames, 2), decoded, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat(latents, 2), encoded, rtol=0, atol=1e-5)
    torch.testing.assert_close(decode_streaming(codec.decoder, z, low), decoded.clamp(-1, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(encode_streaming(codec.encoder, low), encoded, rtol=0, atol=1e-5)


def test_later_frames_change_nothing_before_them(codec: FastCodec) -> None:
    low, z = low_resolution(), latent()
    later, later_z = low.clone(), z.clone()
    later[:, :, 5:] += 1
    later_z[:, :, 2:] += 1
    assert torch.equal(codec.decoder(z, low)[:, :, :5], codec.decoder(later_z, later)[:, :, :5])
    assert torch.equal(codec.encoder(low)[:, :, :2], codec.encoder(later)[:, :, :2])
    assert not torch.equal(codec.decoder(z, low)[:, :, 5:], codec.decoder(later_z, low)[:, :, 5:])


def test_memory_of_a_decoded_clip_grows_with_its_result_alone(codec: FastCodec) -> None:
    peaks = []
    for frames in (9, 33):
        z, low = latent(frames), low_resolution(frames)
        with LiveBytes() as live:
            result = decode_streaming(codec.decoder, z, low)
        peaks.append(live.peak - result.nbytes)
    assert peaks[1] < 1.1 * peaks[0]


def test_it_begins_as_the_decoder_of_a_small_vae_and_goes_on_from_there() -> None:
    torch.manual_seed(0)
    shape = {"z_dim": 8, "latents_mean": [0.3] * 8, "latents_std": [0.5] * 8}
    vae = SmallVideoVAE(**shape, decoder_dims=(16, 12, 8, 8), decoder_blocks=(2, 1, 1))
    torch.nn.init.normal_(vae.decoder[-1].weight)  # untrained, it is the linear path alone
    decoder = FastDecoder(**shape, dims=(16, 12, 8, 8), blocks=(2, 1, 1))
    decoder.start_as(vae)
    z, low = latent(), low_resolution()
    torch.testing.assert_close(decoder(z, low).clamp(-1, 1), decode_latents(vae, z))
    decoder(z, low).square().mean().backward()
    assert decoder.trunk.stem.weight.grad[:, 16:].abs().min() > 0, "LR is not shut out"
    other = FastDecoder(**shape, dims=(12, 12, 8, 8), blocks=(2, 1, 1))
    other.start_as(vae)
    assert not torch.allclose(other(z, low).clamp(-1, 1), decode_latents(vae, z), atol=0.1), "its linear path alone"


def clip(frames: int = 6, height: int = 18, width: int = 26) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def test_the_pipeline_takes_it_from_the_model_folder(fast_folder: Path, codec: FastCodec) -> None:
    pipeline = open_pipeline(fast_folder)
    taken = pipeline.codec("fast")
    assert isinstance(taken, FastCodec)
    assert torch.equal(taken.decode(latent(), low_resolution()), codec.decode(latent(), low_resolution()))
    fast, full = (pipeline(clip(), codec=name).frames for name in ("fast", "full"))  # type: ignore[arg-type]
    assert fast.shape == full.shape == (6, 72, 104, 3) and not np.array_equal(fast, full)
    half = open_pipeline(fast_folder, dtype=torch.bfloat16)(clip(), codec="fast").frames
    assert np.abs(half.astype(int) - fast).mean() < 8


def test_tiles_meet_without_seams(fast_folder: Path) -> None:
    """Where tiles overlap by more than the networks see, they agree: no cross-fade changes anything."""
    pipeline, frames = open_pipeline(fast_folder), clip(5, 40, 48)
    whole = pipeline(frames, codec="fast").frames
    tiled = pipeline(frames, codec="fast", tiling=Tiling(vae_tile_px=128, overlap_px=96)).frames
    assert np.abs(tiled.astype(int) - whole).max() <= 1


def test_it_is_taken_where_it_is_and_the_vae_encodes_where_there_is_no_encoder(
    fast_folder: Path, model_folder: Path, codec: FastCodec
) -> None:
    frames, fast, full = clip(), open_pipeline(fast_folder), open_pipeline(model_folder)
    assert np.array_equal(fast(frames).frames, fast(frames, codec="fast").frames)
    assert np.array_equal(full(frames).frames, full(frames, codec="full").frames)
    fast.lr_encoder = None
    taken, whole = fast.codec(), full.codec()
    assert isinstance(taken, FastCodec) and isinstance(whole, FullCodec)
    torch.testing.assert_close(
        taken.encode(taken.inputs(frames[:5])[None]), whole.encode(whole.inputs(frames[:5])[None])
    )
    assert not np.array_equal(fast(frames).frames, full(frames).frames), "decoded by the fast decoder"


def test_the_command_takes_it_where_it_is(fast_folder: Path, model_folder: Path) -> None:
    for folder, options, codec in (
        (fast_folder, (), "fast"),
        (model_folder, (), "full"),
        (fast_folder, ("--codec", "full"), "full"),
        (fast_folder, ("--codec", "full", "--vae-dtype", "bf16"), "full"),
    ):
        assert parse_arguments(["in.mp4", "out.mp4", "--model", str(folder), *options]).codec == codec
    assert parse_arguments(["in.mp4", "out.mp4", "--vae-dtype", "bf16"]).codec == "fast", "its VAE encodes"
    with pytest.raises(UserError, match=r"--vae-dtype: the fast codec of .* needs no VAE"):
        parse_arguments(["in.mp4", "out.mp4", "--model", str(fast_folder), "--vae-dtype", "bf16"])


def test_a_model_without_it_says_so(model_folder: Path, upscale, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no fast_decoder.*--stage fast_decoder"):
        open_pipeline(model_folder)(clip(), codec="fast")
    with pytest.raises(UserError, match=r"holds no fast_decoder.*--codec full"):
        MemoryEstimate(model_folder, codec="fast")
    for options, said in (
        (("--codec", "hevc"), "--encoder hevc"),
        (("--codec", "quick"), "choose full or fast"),
        (("--bicubic", "--codec", "fast"), "leave one of them out"),
    ):
        done = upscale(tmp_path / "in.mp4", tmp_path / "out.mp4", *options)
        assert done.returncode == 2 and said in done.stderr


def test_the_command_upscales_with_it(fast_folder: Path, model_folder: Path, upscale, tmp_path: Path) -> None:
    video = tmp_path / "in.mp4"
    source = ["-f", "lavfi", "-i", "testsrc2=s=32x24:r=25:d=0.4", str(video)]
    subprocess.run([ffmpeg_binary(), "-v", "error", *source], check=True)
    done = upscale(
        video, tmp_path / "out.mp4", "--model", fast_folder, "--codec", "fast", "--window", 5, "--overlap", 1
    )
    assert done.returncode == 0, done.stderr
    refused = upscale(video, tmp_path / "no.mp4", "--model", model_folder, "--codec", "fast")
    assert refused.returncode == 2 and "holds no fast_decoder" in refused.stderr
    assert not (tmp_path / "no.mp4").exists()


def test_predicted_memory_is_what_it_takes(fast_folder: Path, codec: FastCodec) -> None:
    predicted = MemoryEstimate(fast_folder, codec="fast").window(9, 192, 128, Tiling())
    low, z = low_resolution(9, 32, 48), latent(9, 32, 48)
    with LiveBytes() as live:
        codec.decode(z, low)
    assert predicted.decode == pytest.approx(live.peak, rel=0.1)
    with LiveBytes() as live:
        codec.encode(low)
    assert predicted.encode == pytest.approx(live.peak + low.nbytes, rel=0.1)

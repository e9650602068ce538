"""From a small video to an upscaled one: sound, frames, windows, tiles, cuts, and what happens on bad days."""

import itertools
import json
import signal
import time
from fractions import Fraction

import av
import ffmpeg
import numpy as np
import pytest
import torch

from common.scene_cuts import CONTEXT
from common.video_probe import ffmpeg_binary, probe
from common.video_reader import read_video
from common.video_writer import VideoWriter
from pipeline import latent_codec
from pipeline.resumable_video import only_job
from pipeline.tiling import blend_windows, spans
from pipeline.video_windows import Windows, split_video, upscale_video
from pipeline.vsr_pipeline import Tiling, VSRPipeline, open_pipeline
from tests.commands import start


@pytest.fixture(scope="module")
def pipeline(model_folder):
    return open_pipeline(model_folder)


@pytest.fixture(scope="module")
def whole_video(tmp_path_factory):
    """30 frames of 48x32 at 24000/1001 fps with a tone."""
    path = tmp_path_factory.mktemp("video") / "video.mp4"
    picture = ffmpeg.input("testsrc=size=48x32:rate=24000/1001:duration=1.2512", f="lavfi")
    tone = ffmpeg.input("sine=duration=1.25", f="lavfi")
    ffmpeg.output(picture, tone, str(path), loglevel="error").run(cmd=ffmpeg_binary())
    return path


def frames(count: int, height: int = 24, width: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_saved_and_opened_pipeline_gives_the_same_frames(pipeline, model_folder):
    clip = frames(5)
    first = pipeline(clip, seed=3)
    assert first.frames.shape == (5, 96, 160, 3) and first.frames.dtype == np.uint8
    assert first.dit_evaluations == 1
    assert np.array_equal(VSRPipeline.from_pretrained(model_folder)(clip, seed=3).frames, first.frames)
    assert not np.array_equal(pipeline(clip, seed=4).frames, first.frames)


def test_steps_and_guidance_cost_what_they_should(pipeline):
    assert pipeline(frames(5), num_inference_steps=3).dit_evaluations == 3
    assert pipeline(frames(5), num_inference_steps=3, guidance_weight=2.0).dit_evaluations == 6


@pytest.mark.parametrize("count", [1, 4, 6, 9])
def test_any_number_of_frames_and_odd_sizes(pipeline, count):
    assert pipeline(frames(count, 17, 23)).frames.shape == (count, 68, 92, 3)


def test_windows_and_tiles_agree_with_the_whole_where_the_model_is_local(pipeline):
    """With the DiT's output at zero the pipeline is the VAE's round trip, whose reach is shorter than the overlap."""
    weight = pipeline.transformer.proj_out.weight.clone(), pipeline.transformer.proj_out.bias.clone()
    pipeline.transformer.proj_out.weight.data.zero_()
    pipeline.transformer.proj_out.bias.data.zero_()
    try:
        clip = frames(13, 32, 48)
        whole = pipeline(clip, tiling=Tiling()).frames
        parts = pipeline(clip, tiling=Tiling(transformer_tile_px=96, vae_tile_px=96, overlap_px=64)).frames
    finally:
        pipeline.transformer.proj_out.weight.data.copy_(weight[0])
        pipeline.transformer.proj_out.bias.data.copy_(weight[1])
    assert np.abs(whole.astype(int) - parts).max() <= 1


@pytest.mark.parametrize(
    ("length", "window", "overlap"), [(10, None, 2), (10, 4, 1), (11, 4, 2), (21, 21, 4), (5, 9, 4)]
)
def test_spans_cover_everything_and_blending_identical_windows_changes_nothing(length, window, overlap):
    signal_ = torch.arange(length, dtype=torch.float64)
    parts = [(span, signal_[span.start : span.stop].clone()) for span in spans(length, window, overlap)]
    assert torch.allclose(blend_windows(parts, length, 0), signal_)
    borders = [(a, b) for (a, _), (b, _) in itertools.pairwise(parts)]
    assert all(a.stop - b.start >= overlap for a, b in borders)


def test_video_is_cut_at_scene_changes_and_every_frame_comes_out_once(pipeline):
    dark, bright = np.full((7, 24, 40, 3), 20, np.uint8), np.full((8, 24, 40, 3), 220, np.uint8)
    whole_video = np.concatenate([dark, bright])
    clips = list(split_video(iter(whole_video), Windows(5, 2)))
    assert [(start, shared, len(clip)) for start, shared, clip in clips] == [
        (0, 0, 5), (3, 2, 4), (7, 0, 5), (10, 2, 5),
    ]  # fmt: skip
    for _, _, clip in clips:
        assert clip.min() == clip.max(), "a clip holds two scenes"
    statistics: dict[str, float] = {}
    upscaled = upscale_video([pipeline], iter(whole_video), Windows(5, 2), statistics=statistics)
    result = np.concatenate([clip for clip, _ in upscaled])
    assert result.shape == (15, 96, 160, 3) and statistics["dit_evaluations"] == 4


@pytest.mark.parametrize(
    ("count", "last"), [(38, (20, 17, 18)), (37, (16, 5, 21)), (41, (20, 17, 21)), (22, (4, 17, 18))]
)
def test_the_last_window_is_not_short(pipeline, count, last):
    """It begins a multiple of four frames earlier, so that it draws the same noise; each frame comes out once."""
    video = frames(count, 16, 16) // 16
    assert [(start, shared, len(clip)) for start, shared, clip in split_video(iter(video), Windows())][-1] == last
    clips = [clip for clip, _ in upscale_video([pipeline], iter(video), Windows(), statistics={})]
    assert sum(map(len, clips)) == count


def test_command_keeps_sound_frame_count_and_rate(upscale, model_folder, whole_video, tmp_path):
    output, stats = tmp_path / "out.mp4", tmp_path / "out.json"
    done = upscale(whole_video, output, "--model", model_folder, "--window", 9, "--overlap", 2, "--stats", stats)
    assert done.returncode == 0, done.stderr
    before, after = probe(whole_video), probe(output)
    assert (after.width, after.height) == (192, 128)
    assert after.audio_codecs and after.frame_rate == before.frame_rate == Fraction(24000, 1001)
    assert len(read_video(output)) == len(read_video(whole_video)) == json.loads(stats.read_text())["frames"]


def test_command_writes_ten_bits_in_tiles_with_the_colours_of_the_source(upscale, model_folder, whole_video, tmp_path):
    output = tmp_path / "out.mkv"
    done = upscale(
        whole_video, output, "--model", model_folder, "--bit-depth", 10, "--frames", 12, "--start", 6, "--tile", 96,
        "--vae-tile", 96, "--decode-tile", 64, "--tile-overlap", 32, "--colour-fix", "wavelet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with av.open(str(output)) as container:
        assert container.streams.video[0].pix_fmt == "yuv420p10le"
    result, source = read_video(output), read_video(whole_video, 6, 12)
    assert len(result) == 12
    assert np.abs(result.mean((0, 1, 2)) - source.mean((0, 1, 2))).max() < 8


def test_lossless_output_is_what_the_pipeline_returned(pipeline, tmp_path):
    result = pipeline(frames(5)).frames
    with VideoWriter(tmp_path / "x.mkv", width=160, height=96, frame_rate=Fraction(24), quality="lossless") as writer:
        writer.write(result)
    assert np.array_equal(read_video(tmp_path / "x.mkv"), result)


def test_bad_input_is_one_line_and_leaves_nothing(upscale, model_folder, whole_video, tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    output = tmp_path / "out" / "out.mp4"
    for arguments, words in (
        ((whole_video, output, "--model", tmp_path / "none"), "no model in"),
        ((text, output, "--model", model_folder), "not a readable video"),
        ((tmp_path / "none.mp4", output, "--model", model_folder), "no video file"),
        ((whole_video, output, "--model", model_folder, "--prompt", "a cat"), "not in the prompt cache"),
        ((whole_video, output, "--model", model_folder, "--vae-tile", 64), "must be at least 32 px larger"),
        ((whole_video, output, "--model", model_folder, "--overlap", 15), "at least twice its overlap"),
        ((whole_video, output, "--model", model_folder, "--lossless", "--bit-depth", 10), "hold 8 bits"),
    ):
        done = upscale(*arguments)
        assert done.returncode == 2
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and words in last
        assert not output.parent.exists() or not list(output.parent.iterdir())


def test_terminated_command_leaves_nothing_half_written(model_folder, tmp_path):
    source = tmp_path / "long.mkv"
    with VideoWriter(source, width=40, height=24, frame_rate=Fraction(24), quality="lossless") as writer:
        for seed in range(40):
            writer.write(frames(50, seed=seed))
    output = tmp_path / "out" / "out.mp4"
    process = start("-m", "pipeline.upscale", source, output, "--model", model_folder, warm=False)
    while not (output.parent.exists() and list(output.parent.iterdir())):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    assert not output.parent.exists(), "the folder was made for the output"


@pytest.mark.parametrize("windows", [Windows(5, 2), Windows(9, 2)])
def test_a_video_goes_on_from_any_of_its_places(pipeline, windows):
    """Cuts, short scenes and windows that overlap: what follows a place is the same when the video starts there."""
    scenes = [np.full((count, 24, 40, 3), level, np.uint8) for count, level in ((7, 20), (2, 220), (12, 90))]
    whole_video = np.concatenate(scenes) + frames(21) // 32
    whole = list(upscale_video([pipeline], iter(whole_video), windows, statistics={}))
    places = [index for index, (_, place) in enumerate(whole) if place is not None]
    assert len(places) >= 3
    for index in places:
        start, skip = whole[index][1]
        context = min(start, CONTEXT)
        rest_of_video = iter(whole_video[start - context :])
        again = upscale_video([pipeline], rest_of_video, windows, first=start, context=context, statistics={})
        rest = np.concatenate([clip for clip, _ in again])[skip:]
        assert np.array_equal(rest, np.concatenate([clip for clip, _ in whole[index + 1 :]]))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_job_goes_on_where_it_was(upscale, model_folder, tmp_path, number):
    source, output, whole = tmp_path / "long.mkv", tmp_path / "out" / "out.mp4", tmp_path / "whole.mp4"
    with VideoWriter(source, width=40, height=24, frame_rate=Fraction(24), quality="lossless") as writer:
        for seed in range(6):
            writer.write(frames(20, seed=seed) // 16 + 8 * seed)
    options = ("--model", model_folder, "--part-frames", 20, "--window", 9, "--overlap", 2)
    process = start("-m", "pipeline.upscale", source, output, *options)
    parts = output.with_name(".out.mp4.parts")
    while len(list(parts.glob("part-*.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(60) != 0, process.communicate()
    if number == signal.SIGINT:
        lines = process.communicate()[1].splitlines()
        assert process.returncode == 130 and "the same command resumes" in lines[-1]
        assert all("upscaling: " in line for line in lines[:-1]), "notices of other libraries"
    kept = [json.loads(path.read_text())["frames"] for path in parts.glob("part-*.json")]
    assert len(kept) >= 2 and not output.exists()

    done = upscale(source, output, *options)
    assert done.returncode == 0 and f"resuming after {sum(kept)} frames" in done.stderr
    assert [path.name for path in output.parent.iterdir()] == ["out.mp4"]
    assert upscale(source, whole, *options).returncode == 0
    assert np.array_equal(read_video(output), read_video(whole))
    assert len(read_video(output)) == 120


def test_parts_of_another_job_are_kept_until_restart(upscale, whole_video, tmp_path):
    output = tmp_path / "out.mp4"
    parts = tmp_path / ".out.mp4.parts"
    parts.mkdir()
    (parts / "job.json").write_text('{"seed": "7"}')
    (parts / "part-00000.mp4").write_text("of another video")
    (parts / "part-00000.json").write_text("{}")
    done = upscale(whole_video, output, "--bicubic")
    assert done.returncode == 2 and "seed: 7 -> 0" in done.stderr and "--restart" in done.stderr
    assert (parts / "part-00000.mp4").read_text() == "of another video" and not output.exists()
    assert upscale(whole_video, output, "--bicubic", "--restart").returncode == 0
    assert len(read_video(output)) == 30 and not parts.exists()


def test_an_output_has_one_writer(upscale, whole_video, tmp_path):
    output = tmp_path / "out.mp4"
    with only_job(output):
        done = upscale(whole_video, output, "--bicubic")
    assert done.returncode == 2 and "another job is writing here" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_options_that_change_no_pixel_resume(upscale, model_folder, whole_video, tmp_path, monkeypatch):
    """An interrupted job goes on with another size of its parts, and says how."""
    output = tmp_path / "out.mp4"
    write, calls = VideoWriter.write, []

    def interrupted(self, clip):
        calls.append(len(clip))
        if len(calls) == 4:
            raise KeyboardInterrupt
        write(self, clip)

    options = ("--model", model_folder, "--window", 9, "--overlap", 2)
    monkeypatch.setattr(VideoWriter, "write", interrupted)
    done = upscale(whole_video, output, *options, "--part-frames", 5)
    assert done.returncode == 130 and "the same command resumes" in done.stderr
    monkeypatch.setattr(VideoWriter, "write", write)
    done = upscale(whole_video, output, *options, "--part-frames", 500, "--stats", tmp_path / "stats.json")
    assert done.returncode == 0 and "resuming after" in done.stderr
    assert len(read_video(output)) == 30


def test_full_memory_goes_on_with_smaller_tiles(upscale, model_folder, whole_video, tmp_path, monkeypatch):
    """No GPU here: the decoder refuses more than 40 x 40 latent cells, as a GPU's memory would."""
    decode, refused = latent_codec.decode_latents, []

    def small_memory(vae, z):
        if z.device.type != "meta" and max(z.shape[-2:]) > 40:
            refused.append(tuple(z.shape[-2:]))
            raise torch.cuda.OutOfMemoryError
        return decode(vae, z)

    source = tmp_path / "in.mkv"
    with VideoWriter(source, width=120, height=96, frame_rate=Fraction(24), quality="lossless") as writer:
        writer.write(frames(6, 96, 120))
    monkeypatch.setattr(latent_codec, "decode_latents", small_memory)
    options = ("--model", model_folder, "--tile-overlap", 64, "--lossless")
    done = upscale(source, tmp_path / "out.mkv", *options)
    assert done.returncode == 0 and "on with --decode-tile 256 --vae-tile whole" in done.stderr
    assert refused == [(48, 60)]
    assert upscale(source, tmp_path / "tiled.mkv", *options, "--decode-tile", 256).returncode == 0
    assert np.array_equal(read_video(tmp_path / "out.mkv"), read_video(tmp_path / "tiled.mkv"))

    def no_memory(vae, z):
        if z.device.type == "meta":
            return decode(vae, z)
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(latent_codec, "decode_latents", no_memory)
    done = upscale(source, tmp_path / "none.mkv", *options)
    assert done.returncode == 2 and "the smallest tiles" in done.stderr and not (tmp_path / "none.mkv").exists()

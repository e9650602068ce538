"""A preset small enough to train every stage in seconds: datasets of random latents, a VAE, prompts, a YAML file.

Everything on disk is what the commands read and write; only the sizes are toys.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save

from common.lossless_clip import encode_bytes
from common.seeding import seeded_noise
from common.storage import open_folder
from datagen.dataset.shard_format import Sample, write_manifest, write_shard
from pipeline.model.prompts import DEFAULT_PROMPT, placeholder_cache
from pipeline.model.tiny_vae import TinyVideoVAE
from tests.commands import ROOT, Command, launch, start

TRAIN = ROOT / "trainer" / "run.py"
LATENT = (4, 2, 4, 4)  # C, T, h, w
CLIPS = 12

TRANSFORMER = {
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "ffn_dim": 48,
    "freq_dim": 16,
    "text_dim": 8,
    "latent_channels": LATENT[0],
}
ADAM = {"learning_rate": 1e-3, "betas": [0.9, 0.99]}
SCHEDULE = {"global_batch_size": 4, "checkpoint_every": 2, "validate_every": 0}
TRAINER: dict[str, Any] = {
    "seed": 3,
    "engine": {"zero_stage": 1, "precision": "fp32", "persistence_threshold": 0},
    "attention": "native",
    "validation_clips": 2,
    "tracking": {"wandb": "off", "log_every": 1},
    "schedules": {
        "codec": SCHEDULE | {"steps": 5},
        "base": SCHEDULE | {"steps": 5},
        "progressive": SCHEDULE,
        "dual_stream": SCHEDULE | {"steps": 5},
        "preference": SCHEDULE | {"steps": 5},
        "fast_decoder": SCHEDULE | {"steps": 5},
        "lr_encoder": SCHEDULE | {"steps": 5},
    },
    "codec": {"frames": 5, "side": 16, "optimizer": ADAM},
    "base": {"optimizer": ADAM | {"warmup_updates": 3}, "ema_decay": 0.9},
    "progressive": {"guidance_iterations": 2, "schedule": [2, 1], "iterations_per_halving": 2, "optimizer": ADAM},
    "dual_stream": {
        "auxiliary_updates": 2,
        "student": ADAM,
        "fake_score": ADAM,
        "heads_learning_rate": 3e-3,
        "head": {"hidden_channels": 4},
    },
    "preference": {"optimizer": ADAM},
    "fast_decoder": {
        "shape": {"dims": [8, 8, 6, 4], "blocks": [1, 1, 0]},
        "frames": 5,
        "side": 16,
        "full_decoder_weight": 0.5,
        "adversarial_weight": 0.1,
        "adversarial_from_step": 2,
        "discriminator": {"hidden_channels": 4},
    },
    "lr_encoder": {"shape": {"dim": 8, "blocks": 1}},
}


def write_preset(folder: Path) -> Path:
    """preset.yaml, vae/, prompts/, clips/ and pairs/ in `folder`; returns the YAML file."""
    torch.manual_seed(0)
    TinyVideoVAE(z_dim=LATENT[0], hidden_dim=8, num_blocks=1).save_pretrained(folder / "vae")
    placeholder_cache(TRANSFORMER["text_dim"], 4).save_pretrained(folder / "prompts")
    write_dataset(folder / "clips", "clips", clip)
    write_dataset(folder / "pairs", "pairs", _pair)
    preset = {
        "model": {
            "transformer": TRANSFORMER,
            "vae": str(folder / "vae"),
            "prompts": str(folder / "prompts"),
            "base_steps": 4,
        },
        "trainer": TRAINER,
    }
    path = folder / "preset.yaml"
    path.write_text(yaml.safe_dump(preset, sort_keys=False))
    return path


def run_command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """`start_command`, and wait for its end."""
    started = start_command(*arguments, **options)
    output, errors = started.communicate(timeout=300)
    assert started.returncode is not None
    return subprocess.CompletedProcess(started.args, started.returncode, output, errors)


def start_command(*arguments: object, ranks: int | None = None, **options: Any) -> Command:
    """`python trainer/run.py …`, or through the deepspeed launcher with `ranks`; from a foreign folder.

    Args:
        options: of `tests.commands.start`.
    """
    line, options = (TRAIN, *arguments), {"folder": Path("/")} | options
    return start(*line, **options) if ranks is None else launch(ranks, *line, **options)


def two_ranks_without_a_launcher(
    *arguments: object, rank_1: dict[str, str] | None = None, warm: bool = True
) -> list[tuple[int, str]]:
    """Exit status and stderr of each rank: what they do when nobody ends one for the other.

    Args:
        rank_1: environment of rank 1 alone.
        warm: of `tests.commands.start`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    ranks = [
        start_command(*arguments, environment=meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | own, warm=warm)
        for rank, own in enumerate(({}, rank_1 or {}))
    ]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, error) for rank, error in zip(ranks, errors, strict=True)]


def signal_after(process: Command, log: Path, lines: int, number: signal.Signals) -> None:
    """Send a signal once `log` has `lines` lines."""
    while process.poll() is None:
        if log.exists() and log.read_text().count("\n") >= lines:
            process.send_signal(number)
            return
        time.sleep(0.02)


def losses(output: Path) -> list[dict[str, float]]:
    """What metrics.jsonl says of each step, without clocks."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "data_wait", "memory", "tokens", "samples_per", "tflops", "mfu")
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in rows]


def write_dataset(path: Path, kind: str, make: Any) -> None:
    folder = open_folder(path)
    half = CLIPS // 2
    sidecars = [write_shard(folder, shard, [make(half * shard + i) for i in range(half)]) for shard in range(2)]
    write_manifest(folder, kind, sidecars, {"recipe": "toy"})


def _latent(*parts: object) -> torch.Tensor:
    return seeded_noise(LATENT, *parts)


def clip(index: int) -> Sample:
    z_hr = _latent("hr", index)
    tensors = {"z_hr": z_hr, "z_lr": z_hr + 0.3 * _latent("lr", index)}
    sample = _sample(f"clip-{index:03d}", "latents", tensors, {"caption": DEFAULT_PROMPT})
    hr = (60 * seeded_noise((5, 32, 32, 3), "pixels", index) + 128).clamp(0, 255).to(torch.uint8)
    clips = {"hr.mkv": encode_bytes(hr.numpy()), "lr.mkv": encode_bytes(hr[:, ::4, ::4].contiguous().numpy())}
    return Sample(sample.key, clips | sample.members)


def _pair(index: int) -> Sample:
    z_lr = _latent("lr", index)
    tensors = {"z_win": z_lr + 0.1 * _latent("w", index), "z_lose": z_lr + 0.5 * _latent("l", index), "z_lr": z_lr}
    noises = {"noise_win": ["toy", index, 0], "noise_lose": ["toy", index, 1]}
    return _sample(f"pair-{index:03d}", "pair", tensors, {"caption": DEFAULT_PROMPT, **noises})


def _sample(key: str, member: str, tensors: dict[str, torch.Tensor], metadata: dict[str, Any]) -> Sample:
    content = save({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()})
    return Sample(key, {f"{member}.safetensors": content, "json": json.dumps(metadata).encode()})

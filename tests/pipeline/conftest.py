"""A small model, and the upscale command without a process of its own."""

import signal
import subprocess
import sys

import pytest
import torch

from common.errors import run_command
from pipeline.model.prompts import placeholder_cache
from pipeline.model.tiny_vae import TinyVideoVAE
from pipeline.model.transformer import VSRTransformer
from pipeline.upscale import main
from pipeline.vsr_pipeline import VSRPipeline


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    torch.manual_seed(0)
    transformer = VSRTransformer(
        latent_channels=8, num_attention_heads=2, attention_head_dim=24, text_dim=8, ffn_dim=64, num_layers=2,
        freq_dim=32, low_resolution_skip=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    VSRPipeline(transformer, TinyVideoVAE(z_dim=8), placeholder_cache(8, 4)).save_pretrained(folder)
    return folder


@pytest.fixture
def upscale(monkeypatch, capsys):
    """The command without the seconds that a new process takes to import PyTorch."""

    def run(*arguments: object) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["upscale", *map(str, arguments)])
        handler, status = signal.getsignal(signal.SIGTERM), 0
        try:
            run_command(main)
        except SystemExit as left:
            status = left.code
        finally:
            signal.signal(signal.SIGTERM, handler)
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return run

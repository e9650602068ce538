"""Two ranks and an error: told once, by the right rank, with the right status, and nobody is left waiting."""

from __future__ import annotations

from pathlib import Path

import pytest

from datagen.dataset.loader import ShardReader
from datagen.dataset.shard_format import Sample
from tests.trainer.presets import TRAINER, clip, run_command, two_ranks_without_a_launcher, write_dataset, write_preset


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_preset(tmp_path_factory.mktemp("preset"))


def told(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith(("error:", "Traceback", "[rank"))]


def damage_what_rank_1_reads(preset: Path, folder: Path) -> Path:
    """A copy of the clips in which a sample of rank 1's second batch is no safetensors file."""
    shared = {"seed": TRAINER["seed"], "global_batch_size": 4, "world_size": 2}
    batches = iter(ShardReader(preset.parent / "clips", rank=1, **shared))
    _, victim = next(batches), next(batches).keys[0]

    def damaged(index: int) -> Sample:
        sample = clip(index)
        members = sample.members | ({"latents.safetensors": b"?"} if sample.key == victim else {})
        return Sample(sample.key, members)

    write_dataset(folder, "clips", damaged)
    return folder


@pytest.mark.distributed
def test_one_rank_alone_fails(preset: Path, tmp_path: Path) -> None:
    data = damage_what_rank_1_reads(preset, tmp_path / "clips")
    line = ["--config", preset, "--stage", "base", "--data", data, "--output", tmp_path / "run"]
    (status_0, errors_0), (status_1, errors_1) = two_ranks_without_a_launcher(
        *line, "--set", "trainer.damaged_samples=error"
    )
    assert (status_0, told(errors_0)) == (2, []), "a bystander ends with the same status and says nothing"
    (message,) = told(errors_1)
    assert status_1 == 2 and message.startswith("error: rank 1: ") and "shards/shard-00000" in message


@pytest.mark.distributed
def test_all_ranks_fail_alike_after_they_met(preset: Path, tmp_path: Path) -> None:
    line = ["--config", preset, "--stage", "base", "--data", preset.parent / "clips", "--output", tmp_path]
    (status_0, errors_0), (status_1, errors_1) = two_ranks_without_a_launcher(
        *line, "--set", "trainer.schedules.base.global_batch_size=3"
    )
    (message,) = told(errors_0)
    assert message.startswith("error: trainer.schedules.base.global_batch_size = 3 is not a multiple")
    assert (status_0, status_1, told(errors_1)) == (2, 2, [])


@pytest.mark.distributed
def test_all_ranks_fail_alike_before_they_met(preset: Path, tmp_path: Path) -> None:
    line = ["--config", preset, "--stage", "base", "--data", preset.parent / "clips", "--output", tmp_path]
    result = run_command(*line, "--set", "trainer.base.optimiser.learning_rate=1", ranks=2, warm=False)
    assert result.returncode == 2
    assert told(result.stderr) == [f"error: {preset}: unknown key trainer.base.optimiser; did you mean 'optimizer'?"]

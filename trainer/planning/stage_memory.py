"""Memory of a stage on each GPU: its networks, ZeRO's buffers and its activations, added up.

Apart from trainer/planning/memory.py, whose formulas the stages' specs use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.model.config import ModelConfig
from trainer.config import TrainerConfig
from trainer.planning.memory import GIB, ActivationSizes, NetworkMemory, buffer_memory, network_memory
from trainer.stages.stage import StageSpec


@dataclass(frozen=True)
class StageMemory:
    """GiB on each GPU."""

    networks: dict[str, NetworkMemory]
    #: ZeRO's buckets, and parameters gathered ahead
    buffers: float
    #: the most of any update
    activations: float
    #: of which one block's while it is computed
    last_block: float

    @property
    def static(self) -> float:
        return sum(network.total for network in self.networks.values())

    @property
    def peak(self) -> float:
        """Activations at their most, or the last gradients beside the last block."""
        passing = max(network.passing for network in self.networks.values())
        return self.static + self.buffers + max(self.activations, passing + self.last_block)


def stage_memory(
    stage: StageSpec,
    model: ModelConfig,
    config: TrainerConfig,
    gpus: int,
    latent: tuple[int, int, int],
    batch: int,
    counts: Mapping[str, int],
    trained: Mapping[str, int],
) -> StageMemory:
    """The peak of a step of `stage`.

    Args:
        latent: (T, h, w) of one clip.
        batch: clips per micro-batch.
        counts: parameters of each network.
        trained: how many of them are trained, of the networks that have an optimizer.
    """
    networks, buffers, section = {}, 0.0, config.section_of(stage)
    for name, count in counts.items():
        network, engine = stage.network(name), config.engine_of(name)
        learns = network.optimizer_of(section) is not None
        networks[name] = network_memory(
            count,
            engine,
            gpus,
            trained=learns,
            ema=network.ema,
            trained_parameters=trained.get(name),
            moments=network.moments,
        )
        buffers += buffer_memory(count, engine, gpus, trained=learns)
    sizes = ActivationSizes.of(model.transformer, config.engine_of("student"), latent, batch, config.sequence_parallel)
    latents = stage.latents_per_sample(section)
    activations = sizes.update(latents)
    if stage.activation_bytes is not None:
        activations = stage.activation_bytes(sizes, section)
    last_block = sizes.last_block(latents)
    return StageMemory(networks, buffers, activations / GIB, last_block / GIB)

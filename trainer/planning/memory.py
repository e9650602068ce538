"""How much memory a GPU needs, from shapes alone. One formula per line, so that anyone can check it.

**Networks**: bytes per parameter and rank, n ranks, bf16 weights with float32 masters.

                     weights   gradients   masters + two moments   EMA    passing
    trained, ZeRO-1     2          4               12/n            4/n    4
    trained, ZeRO-2     2          -               12/n            4/n    2 + 4/n
    trained, ZeRO-3     2/n        4/n             12/n            4/n    4/n
    frozen              2 (ZeRO-3: 2/n)

of parameters that learn (with LoRA, a few of them); those that don't count as frozen beside them. "Passing" exists
only from a network's backward to the end of its step: gradients on their way to the optimizer. In float32 weights
take 4, ZeRO-1 keeps no gradients and passes 8, and ZeRO-2 passes 4 + 4/n. Moments begin with the first step.

**Activations**: bytes that a pass holds for its backward, per token and block of width d and FFN width f, in bf16 with
an attention that keeps no matrix of scores.

    parameters that learn   68·d + 4·f    48·d of it are float32 copies made around norms and gates
    constant parameters     36·d + 2·f    gradients only pass through: no input of a linear layer is kept, at ZeRO-3
                                          thanks to trainer/engine/frozen_linear.py
    checkpointed            2·d           and one block whole while its turn is

Where ranks share a clip, a token is one of the rank's own; tapped features and discriminator heads have all of them.

tests/trainer/test_memory.py compares all this with the bytes of all live tensors on a CPU, network by network, block by
block and over whole steps of every stage; benchmarks/memory.py also does it on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.model.config import ModelConfig
from pipeline.model.transformer import tapped_layers
from trainer.config import StageName, TrainerConfig
from trainer.engine.network import DeepSpeedConfig

GIB = 2**30
#: networks with an optimizer; Stage I's teacher keeps masters, to be copied shard by shard
TRAINED = ("student", "critic", "teacher")
#: parameters that ZeRO-3 on several ranks keeps gathered of each network: what it needs again within
#: stage3_max_reuse_distance (DeepSpeed's default is 1e9) forth and back, and a prefetched bucket
REUSE_DISTANCE = 1_000_000_000


@dataclass(frozen=True)
class NetworkMemory:
    """GiB on each GPU."""

    weights: float
    gradients: float
    optimizer: float
    ema: float
    #: from its backward to the end of its step
    passing: float = 0.0

    @property
    def total(self) -> float:
        """What is always there."""
        return self.weights + self.gradients + self.optimizer + self.ema


def network_memory(
    parameters: int,
    config: DeepSpeedConfig,
    gpus: int,
    *,
    trained: bool,
    ema: bool,
    trained_parameters: int | None = None,
    moments: bool = True,
) -> NetworkMemory:
    """Of one network, of which `trained_parameters` learn (None: all); without ZeRO's buckets.

    Args:
        moments: False for a network that only has masters (Stage I's teacher).
    """
    width = 2 if config.precision == "bf16" else 4
    stage = config.zero_stage
    weights = parameters * width / (gpus if stage == 3 else 1)
    if config.offload_parameters and stage == 3:
        weights = 0.0
    if not trained:
        return NetworkMemory(weights / GIB, 0.0, 0.0, 0.0)
    learning = parameters if trained_parameters is None else trained_parameters
    optimizer, average = learning * (12 if moments else 4) / gpus, learning * 4 / gpus if ema else 0.0
    gradients: float
    passing: float
    if stage == 1:
        gradients, passing = (4.0, 4.0) if width == 2 else (0.0, 8.0)
    elif stage == 2:
        gradients, passing = 0.0, width + 4 / gpus
        if config.gradient_accumulation > 1:  # those of earlier micro-batches wait
            gradients, passing = 4 / gpus, float(width)
    else:
        gradients, passing = 4 / gpus, 4 / gpus
    if config.offload_optimizer:
        optimizer = average = 0.0
        if stage > 1:
            gradients, passing = 0.0, float(width) if stage == 2 else 0.0
    return NetworkMemory(
        weights / GIB, learning * gradients / GIB, optimizer / GIB, average / GIB, learning * passing / GIB
    )


def buffer_memory(parameters: int, config: DeepSpeedConfig, gpus: int, *, trained: bool) -> float:
    """GiB of ZeRO's buckets and gathered parameters of one network, on a GPU (where gathering overlaps)."""
    width = 2 if config.precision == "bf16" else 4
    if config.zero_stage == 1:
        return 0.0
    elements = float(config.bucket_size * 2 if trained else 0)
    if config.zero_stage == 3 and gpus > 1:
        elements += min(parameters, REUSE_DISTANCE // 2 + config.bucket_size)
    return elements * width / GIB


def block_bytes(dim: int, ffn_dim: int, precision: str, *, learns: bool) -> float:
    """What one block holds from forward to backward, per token, without checkpointing."""
    if precision == "bf16":
        return 68 * dim + 4 * ffn_dim if learns else 36 * dim + 2 * ffn_dim
    return 88 * dim + 8 * ffn_dim if learns else 48 * dim + 4 * ffn_dim


class Activations:
    """GiB that the passes of one micro-batch hold on one rank."""

    def __init__(
        self, model: ModelConfig, config: TrainerConfig, latent: tuple[int, int, int], batch: int
    ) -> None:
        """
        Args:
            latent: (T, h, w) of one clip.
            batch: clips per micro-batch.
        """
        shape, engine = model.transformer, config.engine_of("student")
        self._config = config
        self._layers, self._ffn = shape.num_layers, shape.ffn_dim
        self._dim = shape.num_attention_heads * shape.attention_head_dim
        self._precision, self._checkpointed = engine.precision, engine.activation_checkpointing
        self._width = 2 if engine.precision == "bf16" else 4
        tokens = 1
        for size, patch in zip(latent, shape.patch_size, strict=True):
            tokens *= size // patch
        self._own = batch * -(-tokens // config.sequence_parallel)
        self._whole = batch * tokens
        #: a latent in float32, per token
        self._latent = (
            4 * shape.latent_channels * shape.patch_size[0] * shape.patch_size[1] * shape.patch_size[2]
        )

    def of(self, stage: StageName) -> float:
        """The most that is alive at once in any update of `stage`."""
        if stage == "dual_stream":
            return max(self.auxiliary_update(), self.student_update()) / GIB
        return self._clips(stage) * self._update() / GIB

    def last_block(self, stage: StageName) -> float:
        """What is left of them when backward comes to its end."""
        return self._clips(stage) * (self._graph(1, True) + self._work(True)) / GIB

    @staticmethod
    def _clips(stage: StageName) -> int:
        return 2 if stage == "preference" else 1  # winner and loser are one batch

    def _update(self) -> float:
        """Forward and backward of a network that learns."""
        return self._graph(self._layers, True) + self._work(True) + self._ends()

    def auxiliary_update(self) -> float:
        """Stage II: features of the real score, then fake score and heads."""
        features = self._feature() * self._taps * (3 if self._tapped_models == 2 else 2)
        graph = self._graph(self._layers, True) + features + self._ends()
        heads = 2 * self._taps * self._head(learns=True) + self._head_work()
        return graph + max(self._work(True), heads)

    def student_update(self) -> float:
        """Stage II: the student's graph waits while both score models' are built, walked and freed."""
        settings = self._config.dual_stream
        student = self._graph(self._layers, True) + self._ends()
        if not settings.gan:
            return student + self._work(True)
        last = tapped_layers(self._layers, settings.tap_fractions)[-1]
        scores = self._ends()
        if settings.tapped != "fake":
            scores += self._graph(last, False)
        if settings.tapped != "real":
            scores += self._graph(self._layers if settings.dmd_weight else last, False)
        scores += self._feature() * self._taps * self._tapped_models  # of HR
        judged = self._taps * self._head(learns=False)
        matched = self._taps * self._tapped_models * self._whole * 4 * self._dim
        heads = judged + max(matched, self._head_work())
        return student + max(scores + max(heads, self._work(False)), self._work(True))

    # --- parts, in bytes ------------------------------------------------------------------------------------

    def _graph(self, blocks: int, learns: bool) -> float:
        """What `blocks` blocks hold between forward and backward."""
        if self._checkpointed:
            return blocks * self._own * self._width * self._dim
        return blocks * self._own * self._block(learns)

    def _work(self, learns: bool) -> float:
        """What is alive besides while a block is computed, forward or backward."""
        inside: float = self._own * self._width * (5 * self._dim + 2 * self._ffn)
        if self._checkpointed:
            inside += self._own * self._block(learns)
        return inside

    def _block(self, learns: bool) -> float:
        return block_bytes(self._dim, self._ffn, self._precision, learns=learns)

    def _ends(self) -> float:
        """The last norm and projection, and latents: z, noise, targets, predictions."""
        return self._own * 12 * self._dim + self._whole * 12 * self._latent

    def _feature(self) -> float:
        return self._whole * self._width * self._dim

    @property
    def _taps(self) -> int:
        settings = self._config.dual_stream
        return len(tapped_layers(self._layers, settings.tap_fractions)) if settings.gan else 0

    @property
    def _tapped_models(self) -> int:
        return 2 if self._config.dual_stream.tapped == "both" else 1

    def _head(self, *, learns: bool) -> float:
        """What one head holds of one latent: its normed input, and its hidden layers around each activation."""
        head = self._config.dual_stream.head
        channels = self._tapped_models * self._dim
        hidden = head.hidden_channels * (head.layers + 1) * self._width
        held = channels * self._width + 2 * hidden if learns else channels * 4 + hidden
        return self._whole * held

    def _head_work(self) -> float:
        """Inputs of one head in float32: normed, joined, turned."""
        return self._whole * 4 * 3 * self._tapped_models * self._dim


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
    stage: StageName,
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
        latent, batch: as in `Activations`.
        counts: parameters of each network.
        trained: how many of them learn, of those that have an optimizer.
    """
    networks, buffers = {}, 0.0
    for name, count in counts.items():
        engine, learns = config.engine_of(name), name in TRAINED
        networks[name] = network_memory(
            count,
            engine,
            gpus,
            trained=learns,
            ema=name == "student",
            trained_parameters=trained.get(name),
            moments=name != "teacher",
        )
        buffers += buffer_memory(count, engine, gpus, trained=learns)
    activations = Activations(model, config, latent, batch)
    return StageMemory(networks, buffers, activations.of(stage), activations.last_block(stage))

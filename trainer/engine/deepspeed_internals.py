"""Every place where DeepSpeed's private attributes are used, for `deepspeed>=0.19.3,<0.20`.

ZeRO keeps float32 masters and Adam moments in flat buffers, under names that differ with the stage. What the trainer
needs of them is here: the fragments of a rank, the moments, the way from masters back to bf16 weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.engine.config import DeepSpeedConfig, OptimizerConfig
from trainer.engine.zero_shards import MOMENTS, Fragment

#: ZeRO-3 updates a parameter group in parts of this many elements; one part per group, or its norm would be unknown
SUB_GROUP_SIZE = 10**15


def deepspeed_config(config: DeepSpeedConfig, optimizer: OptimizerConfig | None) -> dict[str, Any]:
    """The dictionary given to `deepspeed.initialize`; `optimizer` is None for a frozen network."""
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": torch.cuda.is_available(),
        "reduce_bucket_size": config.bucket_size,
    }
    if config.zero_stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": config.persistence_threshold,
            "stage3_prefetch_bucket_size": config.bucket_size,
            "sub_group_size": SUB_GROUP_SIZE,
        }
        if config.offload_parameters:
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    else:
        zero["allgather_bucket_size"] = config.bucket_size
    if config.offload_optimizer and optimizer is not None:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: the stages own their batches
        "gradient_accumulation_steps": config.gradient_accumulation if optimizer is not None else 1,
        "gradient_clipping": 0.0,  # trainer/engine/clipping.py clips per parameter group
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if config.precision == "bf16":
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


class UnshardedModule:
    """Has the attributes of an engine that a frozen module needs, where it is not sharded."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        self.device = device


def frozen_engine(module: nn.Module, config: DeepSpeedConfig) -> Any:
    """Around a network that is never updated: sharded at ZeRO-3, else on every rank. Collective at ZeRO-3."""
    module.requires_grad_(False)
    for parameter in module.parameters():  # parameters only: rotary tables stay float32
        parameter.data = parameter.data.to(config.dtype)
    if config.zero_stage < 3:
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        return UnshardedModule(module.to(device), device)
    with _float32_buffers(module):
        engine, *_ = deepspeed.initialize(model=module, config=deepspeed_config(config, None))
    return engine


def training_engine(
    module: nn.Module, groups: list[dict[str, Any]], config: DeepSpeedConfig, optimizer: OptimizerConfig
) -> Any:
    """Around a network that is updated by AdamW; its masters are the module's float32 weights. Collective."""
    settings: dict[str, Any] = {
        "lr": optimizer.learning_rate,
        "betas": optimizer.betas,
        "weight_decay": optimizer.weight_decay,
        "fused": True,  # one kernel per flat buffer, on the GPU and, for offloaded masters, on the host
    }
    adam = torch.optim.AdamW(groups, **settings)
    with _float32_buffers(module):
        engine, *_ = deepspeed.initialize(model=module, optimizer=adam, config=deepspeed_config(config, optimizer))
    return engine


@contextmanager
def _float32_buffers(module: nn.Module) -> Iterator[None]:
    """DeepSpeed casts buffers with the weights; rotary tables in bf16 would blur positions."""
    kept = {name: buffer.clone() for name, buffer in module.named_buffers()}
    yield
    for name, buffer in module.named_buffers():
        buffer.data = kept[name].to(buffer.device)


def find_fragments(module: torch.nn.Module, zero_optimizer: Any) -> list[Fragment]:
    """The fragments of this rank, in the order of `module.named_parameters()`."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = _stage_3(zero_optimizer) if hasattr(zero_optimizer, "fp16_groups") else _stage_1_2(zero_optimizer)
    by_name = {
        names[id(parameter)]: Fragment(names[id(parameter)], start, numel, flat, offset)
        for parameter, start, numel, flat, offset in found
        if numel > 0
    }
    return [by_name[name] for name in names.values() if name in by_name]


def _stage_3(optimizer: Any) -> Iterator[tuple[Tensor, int, int, Tensor, int]]:
    rank = dist.get_rank()
    for group in optimizer.fp16_groups:
        for parameter in group:
            index, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = rank * padded  # the last ranks hold padding, or nothing at all
            numel = max(0, min(padded, parameter.ds_numel - start))
            yield parameter, start, numel, optimizer.fp32_partitioned_groups_flat[index], offset


def _stage_1_2(optimizer: Any) -> Iterator[tuple[Tensor, int, int, Tensor, int]]:
    # bf16 weights with float32 gradient accumulation at stage 1 get DeepSpeed's BF16_Optimizer.
    groups = getattr(optimizer, "bit16_groups", None) or optimizer.bf16_groups
    flats = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
    for group, flat in zip(groups, flats, strict=True):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield parameter, low.start, low.numel, flat, high.start


def written_moments(engine: Any, fragments: Sequence[Fragment]) -> tuple[float, dict[str, Sequence[Tensor]]]:
    """Adam's step and moments, one view per fragment; 0 and nothing before the first update."""
    states = [engine.optimizer.optimizer.state.get(fragment.flat, {}) for fragment in fragments]
    step = max((float(state["step"]) for state in states if "step" in state), default=0.0)
    if not step:
        return 0.0, {}
    pairs = list(zip(fragments, states, strict=True))
    return step, {key: [fragment.view_of(state[key]) for fragment, state in pairs] for key in MOMENTS}


def writable_moments(engine: Any, fragments: Sequence[Fragment], step: float) -> dict[str, Sequence[Tensor]]:
    """Views of the moments, allocated where the optimizer has not stepped yet; Adam's step becomes `step`."""
    states = engine.optimizer.optimizer.state
    for flat in {id(fragment.flat): fragment.flat for fragment in fragments}.values():
        state = states[flat]
        state["step"] = torch.tensor(step, device=flat.device)
        for key in MOMENTS:
            state.setdefault(key, torch.zeros_like(flat))
    return {key: [f.view_of(states[f.flat][key]) for f in fragments] for key in MOMENTS}


def push_masters(engine: Any, config: DeepSpeedConfig) -> None:
    """Make the (bf16) weights of the module equal to the masters."""
    optimizer = engine.optimizer
    if config.zero_stage == 3:
        optimizer._partition_all_parameters()  # persistent parameters would keep their old values
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        optimizer._post_step(set())
    else:
        optimizer.update_lp_params()

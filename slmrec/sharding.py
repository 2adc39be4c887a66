"""Weights cut up over the processes (FSDP2), as `accelerate launch --config_file` asks for it.

A sharded parameter is a DTensor; the loop needs it whole where it saves, validates and hands the model over. All
functions here are for all processes together, and leave what is not sharded as it is.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from slmrec.errors import ConfigError
from slmrec.processes import is_main_process, process_count


def asked_to_shard() -> bool:
    """Whether the launcher's configuration names FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def prepared(
    accelerator: Accelerator, objective: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Any, torch.optim.Optimizer]:
    """Objective and optimizer as this run's processes need them; FSDP2 on CPUs too, where Accelerate passes it over.

    Raises:
        ConfigError: the launcher's configuration cuts the objective at layers that it does not have, or this
            Accelerate does not follow it.
    """
    if asked_to_shard() and accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.distributed_type = DistributedType.FSDP  # Accelerate 1.15 reads the rest of it on GPUs alone
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    try:
        made: tuple[Any, torch.optim.Optimizer] = accelerator.prepare(objective, optimizer)
    except ValueError as error:
        if not asked_to_shard():
            raise
        raise ConfigError(
            f"the model cannot be sharded as the launcher's configuration says: {error}",
            remedy="fsdp_transformer_layer_cls_to_wrap: the layer class of the decoder, such as LlamaDecoderLayer",
        ) from None
    if asked_to_shard() and process_count() > 1 and not isinstance(made[0], FSDPModule):
        raise ConfigError("Accelerate did not shard the model as its configuration says", remedy="accelerate 1.15")
    return made


def whole(value: Tensor) -> Tensor:
    """A parameter or optimizer state, all shards of it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def collected(value: Tensor) -> Tensor:
    """All shards of a tensor in the main process's host memory, nothing of it elsewhere; one not sharded as it is."""
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor()
    return full.cpu() if is_main_process() else full.new_empty(0)


def sharded_as(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor cut as another one is: this process's part of it."""
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value


@contextmanager
def usable(objective: nn.Module) -> Iterator[None]:
    """Let methods of the objective's parts be called, not its forward alone; layers still gather themselves."""
    if isinstance(objective, FSDPModule):
        objective.unshard()
    yield
    if isinstance(objective, FSDPModule):
        objective.reshard()


@torch.no_grad()
def make_whole(objective: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give every parameter named its value; a sharded objective becomes a plain one in host memory."""
    for name, parameter in list(objective.named_parameters()):
        value = values.get(name, parameter)
        if isinstance(parameter, DTensor):
            owner, _, attribute = name.rpartition(".")
            plain = nn.Parameter(whole(value.detach()).cpu(), requires_grad=parameter.requires_grad)
            setattr(objective.get_submodule(owner), attribute, plain)
        else:
            parameter.copy_(value)
    for module in list(objective.modules()):
        if isinstance(module, FSDPModule):
            _forget_sharding(module)


def _forget_sharding(module: nn.Module) -> None:
    """Undo `fully_shard`, which PyTorch has no call for: its hooks, and the class it derived from the module's own."""
    _, own = type(module).__bases__
    module.__class__ = own
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        hooks.clear()

"""One process or many: which this one is, and what all of them do together.

Many processes are started by `accelerate launch` or `torchrun`, one per device. They share the batches of a training
step (slmrec.train); everything that is written or printed once is the main process's.
"""

import atexit
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from slmrec.errors import ConfigError, SlmrecError

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")

INDEX_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
COUNT_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""What launchers (torch's, Intel MPI, Open MPI, MVAPICH) tell a process; Accelerate reads the same."""

WAIT_LIMIT = timedelta(days=7)
"""The others wait for what the main process does alone, such as a teacher's features; a dead process ends all."""

GRACE_SECONDS = 60
"""A process that fails leaves the message to the main one for so long: a launcher ends all when one has ended."""


def process_count() -> int:
    """Processes of this run; 1 without a launcher."""
    return max(1, _variable(COUNT_VARIABLES, 1))


def process_index() -> int:
    """Number of this process, 0 for the main one."""
    if process_count() == 1:
        return 0
    index = _variable(INDEX_VARIABLES, -1)
    if index < 0:
        raise ConfigError(
            f"{process_count()} processes were started, but none is told its number ({INDEX_VARIABLES[0]})",
            remedy="accelerate launch or torchrun, or unset WORLD_SIZE",
        )
    return index


def is_main_process() -> bool:
    """Whether this process writes and prints."""
    return process_index() == 0


def connect(device: "torch.device") -> None:
    """Join the other processes; does nothing in a run of one.

    Raises:
        ConfigError: several processes were asked for of a launcher that starts one, or a kind of parallelism that the
            training loop was not made for.
    """
    _require_known_parallelism()
    if process_count() > 1:
        from accelerate import PartialState

        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # each process loads the weights, then keeps its share
        PartialState(cpu=device.type == "cpu", timeout=WAIT_LIMIT)
        atexit.unregister(_disconnect)
        atexit.register(_disconnect)
    elif _is_set("ACCELERATE_USE_CPU") and "MASTER_ADDR" in os.environ:
        raise ConfigError(
            "accelerate launch --cpu starts a single process, whatever its --num_processes, unless it has an MPI",
            remedy="accelerate launch --multi_gpu --num_processes 2 -m slmrec.cli.main COMMAND --device cpu",
        )


def on_main(act: Callable[[], Result]) -> Result:
    """Let the main process act while the others wait; each gets the result, or the error that a user can act on.

    `connect` comes first. The result has to be picklable where there are several processes.
    """
    if process_count() == 1:
        return act()
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if is_main_process():
        try:
            outcome[0] = act()
        except (SlmrecError, OSError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: Result = outcome[0]
    return result


def sum_over_processes(values: "torch.Tensor") -> "torch.Tensor":
    """Elementwise sum of the tensors that the processes hold; the very tensor in a run of one."""
    if process_count() == 1:
        return values
    import torch.distributed

    total = values.clone()
    torch.distributed.all_reduce(total)
    return total


def leave(code: int = 0) -> None:
    """End a process that is connected to others, at once; comes back in a run of one.

    Threads of the connection live as long as the last reference to it, which sharded weights keep; one that is still
    busy while the interpreter goes down aborts the process. So nothing is taken down, but by the kernel.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    if code == 0:
        torch.distributed.barrier()  # nobody is still waiting for this process
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def leave_the_message_to_the_main_process() -> None:
    """Wait for the launcher to end this process; comes back where the main process did not fail as well."""
    try:
        is_main = is_main_process()
    except ConfigError:  # what the launcher told this process is the very error
        return
    if not is_main:
        time.sleep(GRACE_SECONDS)


def _require_known_parallelism() -> None:
    """Data parallelism and FSDP2 are; what the launcher was told is in the environment."""
    asked = {
        "FSDP1": _is_set("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2",
        "DeepSpeed": _is_set("ACCELERATE_USE_DEEPSPEED"),
        "Megatron-LM": _is_set("ACCELERATE_USE_MEGATRON_LM"),
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise ConfigError(
                f"the launcher's configuration asks for {name}, which training here does not know",
                remedy="plain data parallelism (--multi_gpu), or distributed_type: FSDP with fsdp_version: 2",
            )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() == "true"


def _disconnect() -> None:
    """Close the connection of a process that does not `leave`, such as a script of somebody else's."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _variable(names: tuple[str, ...], default: int) -> int:
    name = next((name for name in names if name in os.environ), None)
    if name is None:
        return default
    if not os.environ[name].isdigit():
        raise ConfigError(f"{name}={os.environ[name]!r} is no number of processes", remedy=f"unset {name}")
    return int(os.environ[name])

"""A training run that kills itself (SIGKILL) at a named moment: python killed_run.py STAGE RUNS BACKBONE MOMENT COUNT.

The COUNT-th time the moment comes, the process dies; with MOMENT "never" the run ends on its own.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import slmrec.artifact
import slmrec.models.checkpoint
import slmrec.train

torch.set_num_threads(1)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, count: int, act: Callable[..., None]) -> None:
    """Do something before the count-th call of a function, found by its name where it is used."""
    original, calls = getattr(owner, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == count:
            act(*args)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def half_written(path: Path, *_: Any) -> None:
    """What a write leaves that is cut off in its middle."""
    path.write_bytes(b"\x00" * 1000)
    die()


def arrange(moment: str, count: int) -> None:
    if moment == "step":
        before(slmrec.train._Run, "_step", count, lambda *_: die())
    elif moment == "state-write":
        before(slmrec.train, "save_tensors", count, half_written)
    elif moment == "evaluation":
        before(slmrec.train._Run, "_validate", count, lambda *_: die())
    elif moment == "weights-write":
        before(slmrec.models.checkpoint, "save_tensors", count, half_written)
    elif moment == "final-rename":
        before(slmrec.artifact, "_sync", count, lambda path: die() if str(path).endswith(".partial") else None)
        original = Path.rename

        def rename(self: Path, target: Path) -> Path:
            if self.name.startswith(".") and self.name.endswith(".partial"):
                die()
            return original(self, target)

        Path.rename = rename
    elif moment == "features":
        import compress.features

        before(compress.features, "_write_batch", count, lambda *_: die())


def main() -> None:
    stage, runs, folder, moment, count = sys.argv[1:]
    arrange(moment, int(count))
    from slmrec.cli.main import main as command
    from slmrec.processes import leave

    backbone = ["--backbone", folder, "--num-layers", "2"] if stage == "train-teacher" else []
    student = ["--num-layers", "2", "--num-blocks", "2"] if stage == "distill" else []
    flags = ["--epochs", "2", "--save-every-steps", "3", "--batch-size", "64", "--precision", "fp32"]
    prompt = ["--prompt", "none"] if stage == "train-teacher" else []
    command([stage, *backbone, *student, *prompt, *flags, "--runs", runs], standalone_mode=False)
    leave()


if __name__ == "__main__":
    main()

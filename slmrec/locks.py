"""One run at a time makes an output: a lock file beside it, held by the process until the output is there."""

import atexit
import fcntl
import os
from pathlib import Path
from typing import TextIO

from slmrec.errors import ArtifactError

_held: dict[Path, TextIO] = {}


def claim(output: Path) -> None:
    """Keep other processes from writing `output`; again in the same process is no second claim.

    The kernel drops the lock of a process that ends however it ends; a lock file left behind locks nothing.

    Raises:
        ArtifactError: another process is writing it.
    """
    path = _path(output)
    if path in _held:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    while path not in _held:
        stream = path.open("a")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            raise ArtifactError(
                f"another run is writing {output}", remedy="wait until it has ended, or another --output"
            ) from None
        if path.exists() and os.fstat(stream.fileno()).st_ino == path.stat().st_ino:
            _held[path] = stream
        else:  # its last holder removed the file after it was opened here
            stream.close()


def release(output: Path) -> None:
    """Let others write `output`; does nothing where it was not claimed."""
    path = _path(output)
    stream = _held.pop(path, None)
    if stream is not None:
        path.unlink(missing_ok=True)
        stream.close()


def _path(output: Path) -> Path:
    resolved = output.absolute()
    return resolved.with_name(f".{resolved.name}.lock")


def _release_all() -> None:
    for path in list(_held):
        path.unlink(missing_ok=True)
        _held.pop(path).close()


atexit.register(_release_all)

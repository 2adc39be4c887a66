"""One run at a time makes an output: a lock file beside it, held by the process until the output is there."""

import atexit
import fcntl
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TextIO, TypeVar

from slmrec.errors import ArtifactError
from slmrec.processes import is_main_process

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_held: dict[Path, TextIO] = {}


def one_run_at_a_time(stage: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Keep two runs of a stage, or of two stages, from making one `output` (the argument of that name) at once."""
    signature = inspect.signature(stage)

    @wraps(stage)
    def guarded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with claimed(signature.bind(*args, **kwargs).arguments["output"]):
            return stage(*args, **kwargs)

    return guarded


@contextmanager
def claimed(output: Path) -> Iterator[None]:
    """Keep other processes from writing `output`; claims of one process nest, and its helper processes make none.

    The kernel drops the lock of a process that ends however it ends; a lock file left behind locks nothing.

    Raises:
        ArtifactError: another process is writing it, or nobody can.
    """
    resolved = output.absolute()
    path = resolved.with_name(f".{resolved.name}.lock")
    if path in _held or not is_main_process():
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _held[path] = _locked(path, output)
    except (FileExistsError, NotADirectoryError):
        raise  # a file in the way, which the command line tells
    except OSError as error:
        raise ArtifactError(f"{output} cannot be written: {error.strerror}", remedy="another --output") from None
    try:
        yield
    finally:
        _release(path)


def _locked(path: Path, output: Path) -> TextIO:
    while True:
        stream = path.open("a")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            raise ArtifactError(
                f"another run is writing {output}", remedy="wait until it has ended, or another --output"
            ) from None
        if path.exists() and os.fstat(stream.fileno()).st_ino == path.stat().st_ino:
            return stream
        stream.close()  # its last holder removed the file after it was opened here


def _release(path: Path) -> None:
    stream = _held.pop(path, None)
    if stream is not None:
        path.unlink(missing_ok=True)
        stream.close()


def _release_all() -> None:
    for path in list(_held):
        _release(path)


atexit.register(_release_all)

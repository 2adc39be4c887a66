"""Shards answered by Ray Data: a pool of workers that hold one session each, here or on a cluster.

Files, model and output have to lie where every worker sees them under the same path. A dead worker is replaced by Ray,
and its shard begun anew (`bulk.answer_shard`).
"""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

from export.bulk import Engine, Job, answer_shard
from export.runtime import OnnxRecommender
from export.shards import Shard
from slmrec.catalogue import Catalogue, load_catalogue
from slmrec.errors import CheckError, ConfigError, SlmrecError
from slmrec.machine import usable_cores

STORE_BYTES = 100 * 2**20
"""Of Ray's object store: shards travel as their numbers, not as their users."""


@dataclass
class ShardWorker:
    """Answers shards in a process of Ray's by a graph of its own; the graph's data files are mapped, so shared."""

    folder: Path
    job: Job
    provider: str

    @cached_property
    def recommender(self) -> OnnxRecommender:
        """Loaded once a worker."""
        return OnnxRecommender(self.folder, provider=self.provider, threads=1)

    @cached_property
    def items(self) -> Catalogue:
        """Of the graph."""
        return load_catalogue(self.folder)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Answer a shard, given by its fields; errors a user can act on travel as text."""
        problem, remedy = "", ""
        try:
            answer_shard(self.recommender, self.items, Shard(**row | {"file": Path(row["file"])}), self.job)
        except SlmrecError as error:
            problem, remedy = error.problem, error.remedy
        except OSError as error:
            problem, remedy = str(error), "mend that; the same command goes on"
        return {"number": row["number"], "problem": problem, "remedy": remedy}


def ray_engine(folder: Path, *, device: str = "cpu", workers: int | None = None) -> Engine:
    """Ray Data over the shards, one core (or GPU) a worker.

    Args:
        folder: of a graph or bundle.
        device: "cuda" gives every worker a GPU.
        workers: None = as many as there are cores (or GPUs).

    Raises:
        ConfigError: Ray is not installed.
    """
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--engine ray needs {error.name}", remedy="pip install 'slmcompress[ray]'") from None
    gpus = int(device == "cuda")

    def run(shards: Sequence[Shard], job: Job) -> Iterator[Shard]:
        provider = "CUDAExecutionProvider" if gpus else "CPUExecutionProvider"
        worker = ShardWorker(folder.absolute(), replace(job, work=job.work.absolute()), provider)
        if shards:
            with _session(workers, kind := "GPU" if gpus else "CPU") as available:
                if available < (workers or 1):
                    raise ConfigError(
                        f"Ray has {available} {kind}s for {workers or 1} workers", remedy="fewer --workers"
                    )
                yield from _answered(shards, worker, min(workers or available, len(shards)), gpus)

    return run


def _answered(shards: Sequence[Shard], worker: ShardWorker, size: int, gpus: int) -> Iterator[Shard]:
    import ray.data

    rows = [vars(shard) | {"file": str(shard.file.absolute())} for shard in shards]
    by_number = {shard.number: shard for shard in shards}
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        ShardWorker,
        fn_constructor_args=(worker.folder, worker.job, worker.provider),
        compute=ray.data.ActorPoolStrategy(size=size),
        num_cpus=1,
        num_gpus=gpus or None,
    )
    try:
        for row in done.iter_rows():
            if row["problem"]:
                raise SlmrecError(row["problem"], remedy=row["remedy"])
            yield by_number[row["number"]]
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise CheckError(f"Ray gave up: {reason}", remedy="the same command; finished shards are kept") from error


@contextmanager
def _session(workers: int | None, kind: str) -> Iterator[int]:
    """The cluster of RAY_ADDRESS, or a Ray of our own that leaves nothing behind; gives its number of CPUs or GPUs."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray.data

    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    # Ray tells of dead workers on stdout, which is for results
    scratch = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
    with redirect_stdout(sys.stderr), scratch as folder:
        own = {} if "RAY_ADDRESS" in os.environ else {
            "num_cpus": workers or usable_cores(), "include_dashboard": False, "object_store_memory": STORE_BYTES,
            "_temp_dir": folder,
        }  # fmt: skip
        _start(own)
        try:
            yield int(ray.cluster_resources().get(kind, 0))
        finally:
            ray.shutdown()


def _start(settings: dict[str, Any]) -> None:
    """Start or join Ray, which allows itself 30 s to start: on a busy machine the second try finds its files read."""
    import ray

    reason = ""
    for _ in range(2):
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **settings)
        except Exception as error:  # noqa: BLE001 - Ray raises no narrower one for a start that takes too long
            ray.shutdown()
            _end_of(settings.get("_temp_dir"))
            reason = str(error).partition(". ")[0]
            continue
        return
    raise CheckError(
        f"Ray did not start: {reason}", remedy="the same command again, --engine local, or another RAY_ADDRESS"
    )


def _end_of(folder: str | None) -> None:
    """End what a start that failed has left: our own children that were given the folder."""
    for child in psutil.Process().children() if folder else []:
        with suppress(psutil.NoSuchProcess):
            if any(str(folder) in argument for argument in child.cmdline()):
                child.kill()
                child.wait()

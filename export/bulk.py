"""Answers for millions of users, shard by shard: a killed run goes on, and every user is answered exactly once.

A shard's output depends on the shard and the model alone, and is renamed into the work folder when it is whole; so it
does not matter which process answers it, how often one is killed at it, or in which order shards are done.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from export.requests import AnswerWriter, answer_all
from export.shards import Shard, plan_shards, refuse_duplicates, request_files
from slmrec.artifact import (
    Artifact,
    Stage,
    canonical_hash,
    file_sha256,
    is_up_to_date,
    publish,
    read_manifest,
    work_folder,
)  # fmt: skip
from slmrec.bulk_config import BulkConfig
from slmrec.catalogue import Catalogue
from slmrec.errors import ArtifactError, CheckError
from slmrec.locks import one_run_at_a_time
from slmrec.progress import progress_bar
from slmrec.recommender import Recommender, check_top_k

KEY = "slmcompress.run"
ATTEMPTS = 3
"""Processes that may die at one shard before a run gives up."""


@dataclass(frozen=True)
class Job:
    """What every shard of a run shares."""

    work: Path
    """Where finished shards lie until all are."""
    key: str
    """Of the run: model, requests, k and shard size."""
    k: int
    run: str = field(default_factory=lambda: uuid4().hex)
    """Tells this run's processes from those of a killed one that may still be writing."""


Engine = Callable[[Sequence[Shard], Job], Iterator[Shard]]
"""Answers shards, in any order, and gives each when its file is there."""


@dataclass(frozen=True)
class Answers:
    """A finished run."""

    artifact: Artifact
    num_users: int
    num_shards: int
    num_found: int
    """Shards that an earlier run had finished."""
    was_there: bool


@one_run_at_a_time
def recommend_folder(
    model: Artifact, source: Path, output: Path, config: BulkConfig, engine: Engine, *, force: bool = False
) -> Answers:
    """Answer every request of a Parquet file or folder into `output`, a folder with one Parquet file a shard.

    Raises:
        DataError: requests that are missing, malformed, of unknown items, or two of one user.
        ArtifactError: `output` holds, or an unfinished run of it is, something else, and `force` is not set.
    """
    files = request_files(source)
    shards = plan_shards(source, files, config.shard_users)
    num_users = sum(shard.rows for shard in shards)
    requests = canonical_hash([file_sha256(file) for file in files])
    settings = {"top_k": config.top_k, "shard_users": config.shard_users, "requests": requests}
    stage = Stage(name="recommend", kind="answers", settings=settings, parents={"model": model})
    if is_up_to_date(output, stage, force=force):
        return Answers(Artifact(output, read_manifest(output)), num_users, len(shards), len(shards), True)
    refuse_duplicates(files, num_users)
    job = Job(work_folder(output), stage.key, config.top_k)
    missing = _missing(shards, job, output, force=force)
    with progress_bar("users", num_users, done=num_users - sum(shard.rows for shard in missing)) as advance:
        for shard in engine(missing, job):
            advance(shard.rows)
    with publish(output, stage) as folder:
        for shard in shards:
            _link(job.work / shard.name, folder / shard.name)
    shutil.rmtree(job.work)
    return Answers(Artifact(output, read_manifest(output)), num_users, len(shards), len(shards) - len(missing), False)


def local_engine(recommender: Recommender, items: Catalogue) -> Engine:
    """One shard after the other in this process; memory does not grow with the number of users."""

    def run(shards: Sequence[Shard], job: Job) -> Iterator[Shard]:
        check_top_k(job.k, recommender.max_top_k)
        for shard in shards:
            answer_shard(recommender, items, shard, job)
            yield shard

    return run


def answer_shard(recommender: Recommender, items: Catalogue, shard: Shard, job: Job) -> None:
    """Write a shard's answers, unless they are there: beside their place, and renamed when whole."""
    path = job.work / shard.name
    if _is_finished(path, job):
        return
    partial = _attempt(shard, job)
    try:
        with AnswerWriter(partial, ".parquet", {KEY: job.key}) as writer:
            answer_all(recommender, items, shard.requests(), writer, job.k)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _attempt(shard: Shard, job: Job) -> Path:
    """A file that no other process writes; those of processes that died stay and are counted."""
    for number in range(ATTEMPTS):
        partial = job.work / f".{shard.name}.{job.run}.{number}.partial"
        try:
            partial.touch(exist_ok=False)
        except FileExistsError:
            continue
        return partial
    first = shard.offset + shard.start + 1
    raise CheckError(
        f"{ATTEMPTS} workers died at {shard.file.name}, rows {first} to {first + shard.rows - 1}",
        remedy="the same command with fewer --workers (memory?) or a smaller --shard-users; finished shards are kept",
    )


def _missing(shards: Sequence[Shard], job: Job, output: Path, *, force: bool) -> list[Shard]:
    """Shards to be done; what dead processes left is removed, what another run finished only with `force`."""
    for partial in job.work.glob(".*.partial"):
        partial.unlink()
    for path in job.work.glob("*.parquet"):
        if _is_finished(path, job):
            continue
        if not force:
            raise ArtifactError(
                f"{job.work} holds finished shards of another run to {output}: another model, requests or settings",
                remedy="another --output, or --force to discard them",
            )
        path.unlink()
    return [shard for shard in shards if not (job.work / shard.name).exists()]


def _is_finished(path: Path, job: Job) -> bool:
    try:
        notes = pq.read_metadata(path).metadata or {}
    except (FileNotFoundError, pa.ArrowInvalid):
        return False
    return bool(notes.get(KEY.encode()) == job.key.encode())


def _link(source: Path, target: Path) -> None:
    """One file in both folders, so that nothing is lost if the run ends between them; else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)

"""slmcompress recommend with a folder of shards as its output."""

from pathlib import Path
from typing import TYPE_CHECKING

from slmrec.cli.loading import load_recommender
from slmrec.cli.options import print_result
from slmrec.errors import ConfigError

if TYPE_CHECKING:
    from export.bulk import Engine
    from slmrec.artifact import Artifact
    from slmrec.bulk_config import BulkConfig


def wants_folder(source: Path, target: Path, engine: str) -> bool:
    """Whether a folder of shards is to be written: to a path without an ending, from a folder, or by Ray."""
    folder = engine != "local" or source.is_dir() or not target.suffix or target.is_dir()
    if folder and target.suffix in (".jsonl", ".csv", ".parquet") and not target.is_dir():
        raise ConfigError(
            f"{target} is one file; --engine ray and a folder of requests give a folder of shards",
            remedy=f"--output {target.with_suffix('')}",
        )
    return folder


def recommend_shards(
    model: "Artifact", paths: tuple[Path, Path], config: "BulkConfig", *, device: str, force: bool, as_json: bool
) -> None:
    """Answer the requests of a Parquet file or folder (the first path) into a folder (the second)."""
    from export.bulk import recommend_folder
    from slmrec.cli.stages import made

    done = recommend_folder(model, *paths, config, _engine(model, config, device), force=force)
    counts = {"num_users": done.num_users, "num_shards": done.num_shards, "num_shards_found": done.num_found}
    text = f"{paths[1]}: {done.num_users} users in {done.num_shards} shards"
    if done.was_there:
        text = f"{paths[1]} is up to date"
    elif done.num_found:
        text += f", {done.num_found} of which were there from an earlier run"
    print_result(made(done.artifact, done.was_there) | counts, text, as_json=as_json)


def _engine(model: "Artifact", config: "BulkConfig", device: str) -> "Engine":
    if config.engine == "local":
        from export.bulk import local_engine
        from slmrec.catalogue import load_catalogue

        return local_engine(load_recommender(model, device), load_catalogue(model.path))
    if model.kind not in ("graph", "engine", "bundle"):
        raise ConfigError(
            f"--engine ray answers by a graph, {model.path} is a {model.kind}", remedy="-m BUNDLE (slmcompress export)"
        )
    from export.bulk_ray import ray_engine

    return ray_engine(model.path, device=device, workers=config.workers)

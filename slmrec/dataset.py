"""A dataset folder, read: every user's sequence in time order, and the catalogue."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from slmrec.artifact import Artifact, Stage, open_artifact
from slmrec.catalogue import Catalogue, load_catalogue, require_same_catalogue
from slmrec.ragged import Ragged

INTERACTIONS_FILE = "interactions.parquet"
DATASET_FILE = "dataset.json"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Interactions of all users, oldest first, with internal item ids 1..num_items."""

    artifact: Artifact
    user_ids: Sequence[str]
    """External user ids; row r of `sequences` is user r."""
    sequences: Ragged
    items: Catalogue
    info: Mapping[str, Any]
    """`dataset.json`: counts and split."""

    @property
    def num_items(self) -> int:
        """Size of the catalogue."""
        return len(self.items)

    @property
    def hash(self) -> str:
        """Hash of the dataset artefact."""
        return self.artifact.hash


def stage_on(data: Dataset, model: Artifact, name: str, kind: str, settings: Mapping[str, Any]) -> Stage:
    """A run that makes something of a model and its dataset.

    Raises:
        ArtifactError: the two have different catalogues.
    """
    require_same_items(model, data)
    return Stage(name=name, kind=kind, settings=settings, parents={"model": model, "data": data.artifact})


def require_same_items(model: Artifact, data: Dataset) -> None:
    """Refuse a model and a dataset whose items differ."""
    require_same_catalogue(
        load_catalogue(model.path), data.items, model_name=str(model.path), data_name=str(data.artifact.path)
    )


def load_dataset(path: Path) -> Dataset:
    """Read a dataset artefact; its files are checked against the manifest.

    `interactions.parquet` is sorted by user and time and has the columns user (0-based row), user_id (external),
    item (internal 1..num_items) and timestamp.
    """
    artifact = open_artifact(path, "dataset")
    frame = pl.read_parquet(path / INTERACTIONS_FILE)
    lengths = frame.group_by("user", maintain_order=True).agg(pl.len(), pl.col("user_id").first())
    return Dataset(
        artifact=artifact,
        user_ids=lengths["user_id"].cast(pl.String).to_list(),
        sequences=Ragged.from_lengths(frame["item"].to_numpy(), lengths["len"].to_numpy()),
        items=load_catalogue(path),
        info=json.loads((path / DATASET_FILE).read_text(encoding="utf-8")),
    )

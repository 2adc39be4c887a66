"""The items of a dataset: internal id 1..num_items, external id, title, categories and popularity where known."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl

from slmrec.errors import ArtifactError, DataError
from slmrec.writing import write_parquet

ITEMS_FILE = "items.parquet"


@dataclass(frozen=True)
class Catalogue:
    """Items in the order of their internal ids: entry i describes item i + 1."""

    item_ids: Sequence[str]
    """External ids."""
    titles: Sequence[str | None]
    categories: Sequence[str | None]
    num_interactions: Sequence[int] | None = None
    """Of the training split; negative for items that must not be recommended. None in what older versions wrote."""

    def __len__(self) -> int:
        return len(self.item_ids)

    @cached_property
    def internal_ids(self) -> dict[str, int]:
        """External id -> internal id."""
        return {item_id: row + 1 for row, item_id in enumerate(self.item_ids)}

    @cached_property
    def _ids_by_title(self) -> dict[str, list[int]]:
        by_title: dict[str, list[int]] = {}
        for row, title in enumerate(self.titles):
            if title is not None:
                by_title.setdefault(title.casefold(), []).append(row + 1)
        return by_title

    @property
    def has_titles(self) -> bool:
        """Whether any item has a title."""
        return any(title is not None for title in self.titles)

    def to_internal(self, item_ids: Iterable[str]) -> np.ndarray:
        """Internal ids of external ids or, where an id is unknown, of exact titles (case ignored).

        Raises:
            DataError: an item is not in the catalogue, or a title names several.
        """
        return np.array([self._find(item_id) for item_id in item_ids], dtype=np.int64)

    def title_of(self, item: int) -> str:
        """The title of an internal id, its external id where it has none."""
        return self.titles[item - 1] or self.item_ids[item - 1]

    def _find(self, item_id: str) -> int:
        known = self.internal_ids.get(item_id)
        if known is not None:
            return known
        named = self._ids_by_title.get(item_id.casefold(), [])
        if len(named) == 1:
            return named[0]
        if named:
            ids = ", ".join(self.item_ids[item - 1] for item in named[:5])
            raise DataError(f"the title {item_id!r} names {len(named)} items: {ids}", remedy="use one of these ids")
        raise DataError(
            f"the item {item_id!r} is not among the {len(self)} items of the catalogue",
            remedy=f"an id such as {self.item_ids[0]!r}, or an exact title (column item_id or title of items.parquet)",
        )

    def save(self, folder: Path) -> None:
        """Write `items.parquet`: item (internal), item_id (external), title, categories, num_interactions if known."""
        write_parquet(folder / ITEMS_FILE, self.to_frame())

    def to_frame(self) -> pl.DataFrame:
        """One row per item."""
        columns = {
            "item": pl.Series(np.arange(1, len(self) + 1, dtype=np.int64)),
            "item_id": pl.Series(self.item_ids, dtype=pl.String),
            "title": pl.Series(self.titles, dtype=pl.String),
            "categories": pl.Series(self.categories, dtype=pl.String),
        }
        if self.num_interactions is not None:
            columns["num_interactions"] = pl.Series(self.num_interactions, dtype=pl.Int64)
        return pl.DataFrame(columns)


def load_catalogue(folder: Path) -> Catalogue:
    """Read `items.parquet` of any artefact."""
    frame = pl.read_parquet(folder / ITEMS_FILE)
    if frame["item"].to_list() != list(range(1, len(frame) + 1)):
        raise ArtifactError(f"{folder / ITEMS_FILE} does not list the items 1..{len(frame)}", remedy="make it again")
    known = frame["num_interactions"].to_list() if "num_interactions" in frame.columns else None
    return Catalogue(frame["item_id"].to_list(), frame["title"].to_list(), frame["categories"].to_list(), known)


def require_same_catalogue(model: Catalogue, data: Catalogue, *, model_name: str, data_name: str) -> None:
    """Refuse a model and a dataset whose items differ."""
    if list(model.item_ids) == list(data.item_ids):
        return
    first = next((i for i, (a, b) in enumerate(zip(model.item_ids, data.item_ids, strict=False)) if a != b), None)
    where = "" if first is None else f"; item {first + 1} is {model.item_ids[first]!r} and {data.item_ids[first]!r}"
    raise ArtifactError(
        f"{model_name} and {data_name} have different catalogues: {len(model)} and {len(data)} items{where}",
        remedy="the dataset the model was trained on (-d/--data), or train the model on this one",
    )

"""update-items: items join and leave a bundle's catalogue; its decoder stays as it is."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from export.bundle import BENCHMARK_FILE, MAX_GOLDEN, write_sums
from export.card import CARD_FILE, write_papers
from export.engine_files import ENGINE_FILE
from export.golden import GOLDEN_FILE, save_golden, stored_golden
from export.items import PROJECTION_FILE, ItemWeights, read_items, write_items
from export.mlbom import MLBOM_FILE
from export.parity import PARITY_FILE, ParityRule, check_other_graphs, compare
from export.runtime import ITEM_DATA, SIGNATURE_FILE, OnnxRecommender, read_signature
from export.signing import SIGNED_FILE, SUMS_FILE, fingerprint
from export.triton import write_triton
from slmrec.artifact import MANIFEST, Artifact, Stage, file_sha256, is_up_to_date, open_artifact, publish, write_json
from slmrec.catalogue import ITEMS_FILE, Catalogue, load_catalogue
from slmrec.checks import is_unicode
from slmrec.errors import ConfigError, DataError
from slmrec.locks import one_run_at_a_time
from slmrec.ragged import Ragged
from slmrec.recommender import Histories, TopK

LEFT_BEHIND = {
    ITEM_DATA, SIGNATURE_FILE, ITEMS_FILE, GOLDEN_FILE, BENCHMARK_FILE, PARITY_FILE, SUMS_FILE, SIGNED_FILE,
    ENGINE_FILE, MANIFEST, CARD_FILE, MLBOM_FILE,
}  # fmt: skip
"""Files of a bundle that are made anew, or that were measured on the old catalogue."""
COLUMNS = ("item", "title", "similar", "vector", "output_vector", "bias")
"""Of a file of new items."""
MAX_CHECKED = 64
"""New items whose first recommendations are checked."""


@dataclass(frozen=True)
class NewItem:
    """An item that joins."""

    item_id: str
    title: str | None
    similar: tuple[int, ...]
    """Internal ids whose rows it gets the mean of; empty where vectors are given."""
    vector: np.ndarray | None
    """Its own vector, as in the teacher's item table."""
    output_vector: np.ndarray | None
    """Its row of a linear head."""
    bias: float


@one_run_at_a_time
def update_items(
    bundle: Artifact, output: Path, *, items: Path | None, retire: Path | None, key: Path | None = None,
    force: bool = False,
) -> tuple[Artifact, bool]:  # fmt: skip
    """Write a bundle with further items, or without some; gives the artefact and whether it was there already.

    Args:
        bundle: the bundle to go on from.
        output: the new bundle.
        items: a .parquet or .jsonl file of new items: `item`, `title` if known, and `similar` (ids of the catalogue,
            whose mean the new item is) or `vector`; linear heads need `output_vector` (and `bias`) as well.
        retire: a text file of ids that must not be recommended any more, one a line; they stay known in histories.
        key: private Ed25519 key to sign with, see `export.signing`.
        force: replace a bundle made of something else.

    Raises:
        DataError: the files do not fit the catalogue or its room.
        CheckError: the new bundle does not answer as its tables say.
    """
    if items is None and retire is None:
        raise ConfigError("neither new items nor retired ones were named", remedy="--items FILE, --retire FILE or both")
    for path in (items, retire):
        if path is not None and not path.is_file():
            raise DataError(
                f"{path} is no file", remedy="the path of a table of new items, or of a list of retired ids"
            )
    settings = {name: file_sha256(path) for name, path in (("items", items), ("retire", retire)) if path is not None}
    if key is not None:
        settings["signed_by"] = fingerprint(key)
    stage = Stage(name="update-items", kind="bundle", settings=settings, parents={"bundle": bundle})
    if is_up_to_date(output, stage, force=force):
        return open_artifact(output), True
    catalogue, signature = load_catalogue(bundle.path), read_signature(bundle.path)
    joining, changed = _changes(bundle.path, catalogue, signature, items=items, retire=retire)
    with publish(output, stage, finish=partial(write_sums, key=key)) as folder:
        for entry in sorted(bundle.path.iterdir()):
            if entry.is_file() and entry.name not in LEFT_BEHIND and entry.suffix not in (".plan", ".rtx"):
                shutil.copyfile(entry, folder / entry.name)
        write_json(folder / SIGNATURE_FILE, signature | {"num_items": changed.count})
        write_items(folder, changed)
        _extended(catalogue, joining, changed).save(folder)
        write_triton(folder, _check_and_save_golden(bundle.path, folder, changed, len(joining)))
        write_papers(folder, bundle, None)
    return open_artifact(output), False


def _changes(
    bundle: Path, catalogue: Catalogue, signature: Mapping[str, Any], *, items: Path | None, retire: Path | None
) -> tuple[list[NewItem], ItemWeights]:
    """The items that join, and the tables with them and without those who leave."""
    tables = read_items(bundle)
    with np.load(bundle / PROJECTION_FILE, allow_pickle=False) as stored:
        projection = dict(stored)
    joining = [] if items is None else read_new_items(items, catalogue, tables, len(projection["weight"]))
    if signature["has_titles"] and any(item.vector is not None for item in joining):
        raise DataError(f"{items}: items of this model have a share from their titles as well", remedy="similar items")
    leaving = [] if retire is None else read_retired(retire, catalogue)
    changed = updated(tables, joining, leaving, projection if signature["folds_items"] else {})
    if not np.isfinite(changed.offsets[1 : changed.count + 1]).any():
        raise DataError(f"{retire} leaves no item that could be recommended", remedy="a shorter list")
    return joining, changed


def read_new_items(path: Path, catalogue: Catalogue, tables: ItemWeights, item_dim: int) -> list[NewItem]:
    """The items of a file, checked against the catalogue; `item_dim` is the width of an item's own vector.

    Raises:
        DataError: another format or other columns, an id that is there already or twice, unknown similar items, vectors
            of another width or that are not finite, or more items than there is room for.
    """
    found, ids = [], dict.fromkeys(catalogue.item_ids)
    for where, row in _rows(path):
        item = _new_item(row, where, catalogue, (tables, item_dim))
        if item.item_id in ids:
            raise DataError(f"{where}: the item {item.item_id!r} is there already", remedy="an id that was never used")
        ids[item.item_id] = None
        found.append(item)
    if not found:
        raise DataError(f"{path} has no item", remedy='rows such as {"item": "x", "similar": ["50"]}')
    room = tables.rows - 1 - tables.count
    if len(found) > room:
        raise DataError(
            f"{path} has {len(found)} items, and the bundle has room for {room}",
            remedy="slmcompress export again, with a larger --spare-items",
        )
    return found


def read_retired(path: Path, catalogue: Catalogue) -> list[int]:
    """Internal ids of a text file of external ones, one a line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise DataError(f"{path} is no UTF-8 text", remedy="one id a line") from None
    retired: list[int] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            retired += _known(catalogue, [line.strip()], f"{path}, line {number}")
    if not retired:
        raise DataError(f"{path} names no item", remedy="one id a line")
    return retired


def _known(catalogue: Catalogue, item_ids: list[str], where: str) -> list[int]:
    """Internal ids; one that is not known is named with its place."""
    try:
        return [int(item) for item in catalogue.to_internal(item_ids)]
    except DataError as error:
        raise DataError(f"{where}: {error.problem}", remedy=error.remedy) from None


def updated(
    tables: ItemWeights, joining: list[NewItem], leaving: list[int], projection: Mapping[str, np.ndarray]
) -> ItemWeights:
    """The tables with new rows after the last item, and without scores for those who leave.

    `projection` (weight, bias) makes a row of the table of an item's own vector; empty where the graph does so.
    """
    table, outputs, offsets = (np.array(values) for values in (tables.table, tables.outputs, tables.offsets))
    for row, item in enumerate(joining, start=tables.count + 1):
        offsets[row] = item.bias
        if item.vector is not None:
            table[row] = item.vector @ projection["weight"] + projection["bias"] if projection else item.vector
            outputs[row] = item.vector if item.output_vector is None else item.output_vector
        else:
            near = np.array(item.similar)
            table[row] = tables.table[near].mean(axis=0)
            outputs[row] = tables.outputs[near].mean(axis=0) if item.output_vector is None else item.output_vector
    offsets[leaving] = -np.inf
    return replace(tables, count=tables.count + len(joining), table=table, outputs=outputs, offsets=offsets)


def expected_lists(tables: ItemWeights, users: np.ndarray, histories: Histories, k: int, *, keep_history: bool) -> TopK:
    """What the tables say in plain numpy: products, offsets, a stable sort."""
    items, best = np.zeros((len(users), k), dtype=np.int64), np.zeros((len(users), k), dtype=np.float32)
    for row, (history, excluded) in enumerate(zip(histories.item_ids, histories.exclude_ids, strict=True)):
        scores = tables.outputs @ users[row] + tables.offsets
        scores[excluded if keep_history else np.concatenate([history, excluded])] = -np.inf
        items[row] = np.argsort(-scores, kind="stable")[:k]
        best[row] = scores[items[row]]
    return TopK(np.where(best == -np.inf, 0, items), best)


def _check_and_save_golden(old: Path, new: Path, tables: ItemWeights, num_new: int) -> Histories:
    """Golden requests, and such with a new item at their end, must be answered as the tables say; gives them."""
    histories, _ = stored_golden(old)
    histories = histories.select(np.arange(min(len(histories), MAX_GOLDEN)))  # earlier updates added some
    fresh = tables.count - np.arange(min(num_new, MAX_CHECKED))
    rows = [*histories.item_ids]
    rows += [np.append(histories.item_ids[i % len(histories)], item) for i, item in enumerate(fresh)]
    excluded = [*histories.exclude_ids, *(histories.exclude_ids[i % len(histories)] for i in range(len(fresh)))]
    asked = Histories(Ragged.from_rows(rows), Ragged.from_rows(excluded))
    recommender = OnnxRecommender(new)
    k = min(recommender.max_top_k, recommender.num_items)
    keep_history = bool(recommender.signature["keep_history"])
    wanted = expected_lists(tables, recommender.user_vectors(asked), asked, k, keep_history=keep_history)
    answer = recommender.recommend(asked, k)
    compare(wanted, answer, ParityRule(precision="fp32"))
    check_other_graphs(new, asked)
    save_golden(new, asked, answer)
    return asked


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row stands, and the row."""
    if path.suffix not in (".parquet", ".jsonl"):
        raise DataError(f"{path} is neither .parquet nor .jsonl", remedy="a column item, and similar or vector")
    where = str(path)
    try:
        if path.suffix == ".parquet":
            for number, row in enumerate(pl.read_parquet(path).to_dicts(), start=1):
                yield f"{path}, row {number}", row
            return
        for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), start=1):
            where = f"{path}, row {number}"
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise DataError(f"{where}: {row!r} is no record", remedy='{"item": "x", "similar": ["50"]}')
                yield where, row
    except (pl.exceptions.PolarsError, OSError, ValueError, RecursionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{where} cannot be read: {reason}", remedy="a .parquet or .jsonl table") from None


def _new_item(row: dict[str, Any], where: str, catalogue: Catalogue, widths: tuple[ItemWeights, int]) -> NewItem:
    tables, item_dim = widths
    unknown = [name for name in row if name not in COLUMNS]
    if unknown:
        raise DataError(f"{where}: the column {unknown[0]!r} is unknown", remedy=f"columns of {', '.join(COLUMNS)}")
    item, title, bias = row.get("item"), row.get("title"), row.get("bias")
    is_id = isinstance(item, str | int) and not isinstance(item, bool) and _is_id(str(item))
    if not is_id or not (title is None or (isinstance(title, str) and is_unicode(title))):
        raise DataError(
            f"{where}: the item is {item!r}, its title {title!r}; expected are an id on one line and a text",
            remedy="a column item with an id in every row",
        )
    similar, vector, output = (row.get(name) for name in ("similar", "vector", "output_vector"))
    if (similar is None) == (vector is None) or similar == []:
        found = "both" if similar and vector is not None else "neither"
        raise DataError(
            f"{where}: similar or vector is needed, one of the two; there is {found}",
            remedy="ids of similar items, or a vector",
        )
    if similar is not None and not (isinstance(similar, list) and all(isinstance(one, str) for one in similar)):
        raise DataError(f"{where}: similar is {similar!r}, expected is a list of ids as text", remedy='["50", "172"]')
    if tables.has_biases != (output is not None) or not (tables.has_biases or bias is None):
        needed = "an output_vector (and a bias)" if tables.has_biases else "neither output_vector nor bias"
        raise DataError(f"{where}: this head takes {needed}", remedy="rows of the head where it has its own, else none")
    return NewItem(
        str(item),
        title,
        tuple(_known(catalogue, similar, where)) if similar is not None else (),
        None if vector is None else _finite(vector, item_dim, f"{where}: vector"),
        None if output is None else _finite(output, tables.outputs.shape[1], f"{where}: output_vector"),
        float(_finite([0.0 if bias is None else bias], 1, f"{where}: bias")[0]),
    )


def _is_id(text: str) -> bool:
    """Whether an id can stand alone on a line of a file, as lists of retired items have it."""
    return bool(text) and text == text.strip() and is_unicode(text) and not any(ord(one) < 32 for one in text)


def _finite(values: Any, width: int, where: str) -> np.ndarray:
    try:
        array = np.array(values, dtype=np.float32)
    except (TypeError, ValueError):
        raise DataError(f"{where} is {values!r}", remedy=f"a list of {width} numbers") from None
    if array.shape != (width,):
        raise DataError(f"{where} has {array.size} numbers, expected are {width}", remedy="vectors of the item table")
    if not np.isfinite(array).all():
        raise DataError(f"{where} is not finite", remedy="finite numbers")
    return array


def _extended(catalogue: Catalogue, joining: list[NewItem], tables: ItemWeights) -> Catalogue:
    """The catalogue with the items that join; nobody has taken them yet, and nobody is given those that left."""
    counts = catalogue.num_interactions
    if counts is not None:
        left = tables.offsets[1 : tables.count + 1] == -np.inf
        counts = np.where(left, -1, [*counts, *(0 for _ in joining)]).tolist()
    return Catalogue(
        [*catalogue.item_ids, *(item.item_id for item in joining)],
        [*catalogue.titles, *(item.title for item in joining)],
        [*catalogue.categories, *(None for _ in joining)],
        counts,
    )

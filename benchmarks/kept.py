"""Ranks that a study keeps with the repository: where a seed takes hours, seeds are filled one by one, on any machine.

`results/NAME_ranks.parquet` has a row for each model of each seed: the rank of every test user's target, and the
commit, date and machine that gave it. A seed is kept or replaced as a whole, so that its models are of one family.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import polars as pl
from recording import RESULTS, commit

from slmrec.machine import describe_machine
from slmrec.writing import write_parquet

SCHEMA = {
    "dataset": pl.String, "seed": pl.Int64, "row": pl.String, "ranks": pl.List(pl.Int8), "commit": pl.String,
    "date": pl.String, "machine": pl.String,
}  # fmt: skip
"""Ranks count from 0; -1 = not among the first hundred."""


def keep(name: str, dataset: str, seed: int, ranks: Mapping[str, np.ndarray]) -> None:
    """Replace what is kept of one seed of a data set; `ranks` has those of each row's users."""
    machine, now = describe_machine(), datetime.now(UTC).date().isoformat()
    where = json.dumps({part: machine[part] for part in ("cpu", "cpu_flags", "gpu", "versions")})
    rows = [
        {"dataset": dataset, "seed": seed, "row": row, "ranks": found.tolist(), "commit": commit(), "date": now,
         "machine": where}
        for row, found in ranks.items()
    ]  # fmt: skip
    others = _read(name).filter(~((pl.col("dataset") == dataset) & (pl.col("seed") == seed)))
    write_parquet(_path(name), pl.concat([others, pl.DataFrame(rows, schema=SCHEMA)]).sort("dataset", "seed", "row"))


def kept(name: str, dataset: str, seed: int) -> dict[str, np.ndarray]:
    """Ranks of each row's users, as they are kept of one seed; empty where none are."""
    found = _read(name).filter((pl.col("dataset") == dataset) & (pl.col("seed") == seed))
    return {row["row"]: np.array(row["ranks"], dtype=np.int64) for row in found.iter_rows(named=True)}


def kept_seeds(name: str) -> list[dict[str, Any]]:
    """Where and when each seed was filled."""
    columns = ["dataset", "seed", "commit", "date", "machine"]
    rows = _read(name).select(columns).unique(maintain_order=True).to_dicts()
    return [row | {"machine": json.loads(row["machine"])} for row in rows]


def _path(name: str) -> Any:
    return RESULTS / f"{name}_ranks.parquet"


def _read(name: str) -> pl.DataFrame:
    return pl.read_parquet(_path(name)) if _path(name).exists() else pl.DataFrame(schema=SCHEMA)

"""bundle: the folder that is handed to a serving team, which can verify and run it without PyTorch."""

import json
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from export.card import write_papers
from export.engine_files import ENGINE_FILE, ENGINE_FOLDER, read_engines
from export.golden import save_golden
from export.items import PROJECTION_FILE
from export.parity import PARITY_FILE, ParityRule
from export.runtime import DATA_FILES, SIGNATURE_FILE, TUNE_FILE, OnnxRecommender, read_signature
from export.signing import SIGNED_FILE, SUMS_FILE, fingerprint, sign
from export.triton import write_triton
from slmrec.artifact import Artifact, Stage, file_sha256, is_up_to_date, open_artifact, publish, write_json
from slmrec.catalogue import ITEMS_FILE, load_catalogue, require_same_catalogue
from slmrec.dataset import Dataset
from slmrec.errors import DataError
from slmrec.locks import one_run_at_a_time
from slmrec.recommender import Histories
from slmrec.sequences import test_cases

RULE_FILE, BENCHMARK_FILE = "rule.json", "benchmark.json"
MAX_GOLDEN = 64


@one_run_at_a_time
def bundle(
    graph: Artifact, data: Dataset, output: Path, *, report: Path | None = None, key: Path | None = None,
    force: bool = False,
) -> tuple[Artifact, bool]:  # fmt: skip
    """Put a graph, its contract, golden answers and measurements into one folder.

    Args:
        graph: an exported graph.
        data: real histories for the golden requests; no user id is kept.
        output: the bundle.
        report: a benchmark's folder whose `benchmark.json` goes along.
        key: private Ed25519 key to sign with, see `export.signing`.
        force: replace a bundle made of something else.

    Raises:
        DataError: the report holds no benchmark of this graph.
        ConfigError: the key is none.
    """
    require_same_catalogue(
        load_catalogue(graph.path), data.items, model_name=str(graph.path), data_name=str(data.artifact.path)
    )
    parents = {"graph": graph, "data": data.artifact}
    benchmark = None
    if report is not None:
        measured = open_artifact(report, "report")
        parents["report"] = measured
        benchmark = json.loads((report / BENCHMARK_FILE).read_text(encoding="utf-8"))
        if not any(row.get("hash") == graph.hash for row in benchmark["rows"]):
            raise DataError(
                f"{report} holds no measurement of {graph.path} as it is now",
                remedy=f"slmcompress benchmark {graph.path} ..., or bundle without --report",
            )
    settings = {} if key is None else {"signed_by": fingerprint(key)}
    stage = Stage(name="bundle", kind="bundle", settings=settings, parents=parents)
    if is_up_to_date(output, stage, force=force):
        return open_artifact(output), True
    with publish(output, stage, finish=partial(write_sums, key=key)) as folder:
        graphs = read_signature(graph.path)["graphs"]
        for name in (*graphs, *DATA_FILES, SIGNATURE_FILE, ITEMS_FILE, PROJECTION_FILE, PARITY_FILE, TUNE_FILE):
            if (graph.path / name).exists():
                shutil.copyfile(graph.path / name, folder / name)
        _copy_engines(graph.path, folder)
        histories = write_golden(folder, data)
        write_json(folder / RULE_FILE, asdict(ParityRule(precision=read_signature(folder)["precision"])))
        if benchmark is not None:
            write_json(folder / BENCHMARK_FILE, without_paths(benchmark))
        write_triton(folder, histories)
        write_papers(folder, graph, benchmark)
    return open_artifact(output), False


def _copy_engines(graph: Path, folder: Path) -> None:
    """Engines, and the graph and script that build them on the target."""
    if not (graph / ENGINE_FILE).exists():
        return
    for name in (ENGINE_FILE, *(engine["file"] for engine in read_engines(graph)["engines"])):
        shutil.copyfile(graph / name, folder / name)
    shutil.copytree(graph / ENGINE_FOLDER, folder / ENGINE_FOLDER)


def write_golden(folder: Path, data: Dataset) -> Histories:
    """Write real requests of all lengths and the graph's own answers; gives the requests."""
    cases = test_cases(data.sequences)
    order = np.argsort(cases.histories.item_ids.lengths, kind="stable")
    rows = order[np.unique(np.linspace(0, len(order) - 1, MAX_GOLDEN).astype(np.int64))]
    histories = cases.histories.select(rows)
    recommender = OnnxRecommender(folder)
    save_golden(folder, histories, recommender.recommend(histories, min(recommender.max_top_k, recommender.num_items)))
    return histories


def write_sums(folder: Path, key: Path | None = None) -> None:
    """SHA256SUMS over every other file, the manifest included; with a key also its signature."""
    (folder / SUMS_FILE).write_text(sums(folder), encoding="ascii")
    if key is not None:
        sign(folder, key)


def sums(folder: Path) -> str:
    """What SHA256SUMS has to say of the folder as it is: sorted, one line a file, as sha256sum writes it."""
    own = (folder / SUMS_FILE, folder / SIGNED_FILE)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path not in own)
    return "".join(f"{file_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)


def without_paths(benchmark: dict[str, Any]) -> dict[str, Any]:
    """The benchmark without the places where its artefacts lay."""
    rows = [{**row, "artifact": Path(row["artifact"]).name} for row in benchmark["rows"]]
    dataset = {name: value for name, value in benchmark["dataset"].items() if name != "path"}
    return {**benchmark, "rows": rows, "dataset": dataset}

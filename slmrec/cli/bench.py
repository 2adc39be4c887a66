"""slmcompress evaluate, slmcompress benchmark."""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slmrec.cli.options import common_options, data_option, model_option, output_option, print_result, runs_folder, say
from slmrec.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from slmrec.artifact import Artifact
    from slmrec.config import BenchmarkConfig
    from slmrec.dataset import Dataset
    from slmrec.latency import Memory
    from slmrec.report import Report

RECOMMENDS = ("checkpoint", "graph", "engine", "bundle")
MADE_BY = "slmcompress distill, quantize or export make artefacts to measure"


class IntList(click.ParamType):
    """Integers with commas between them, or a TOML list."""

    name = "n,n,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Read what the flag or the TOML file holds."""
        parts = value.split(",") if isinstance(value, str) else value
        try:
            return tuple(int(part) for part in parts)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is not a list such as 8,32", param, ctx)


@click.command()
@model_option
@data_option
@click.option("--split", type=click.Choice(["test", "validation"]), default="test", show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=256, show_default=True, help="Users in a call.")
@click.option("--allow-repeats", is_flag=True, help="Let items of the past be recommended (export --keep-history).")
@common_options
def evaluate(
    *,
    model: Path | None,
    data: Path | None,
    split: str,
    batch_size: int,
    allow_repeats: bool,
    as_json: bool,
    force: bool,
    device: str,
    seed: int,
) -> None:
    """Accuracy of one artefact: full-catalogue HR@1/5/10, NDCG@5/10 and MRR."""
    from slmrec.cli.loading import choose, choose_student, load_recommender
    from slmrec.dataset import require_same_items
    from slmrec.evaluate import evaluate as run
    from slmrec.evaluate import held_out_cases
    from slmrec.progress import progress_bar

    dataset = _load_data(data)
    artifact = choose(model, "", "slmcompress distill", *RECOMMENDS) if model else choose_student(None)
    require_same_items(artifact, dataset)
    cases, protocol = held_out_cases(dataset.sequences, split, allow_repeats=allow_repeats)
    recommender = load_recommender(artifact, device)
    if allow_repeats and not getattr(recommender, "signature", {}).get("keep_history", False):
        raise ConfigError(
            f"{artifact.path} never recommends an item of the past",
            remedy="a graph of slmcompress export --keep-history",
        )
    with progress_bar("evaluate", len(cases)) as bar:
        accuracy = run(recommender, cases, protocol=protocol, batch_size=batch_size, progress=bar)
    print_result(accuracy.to_json(), f"{artifact.path}\n{accuracy.to_text()}", as_json=as_json)


@click.command()
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="ARTIFACT...")
@data_option
@output_option("report")
@click.option("--baseline", help="Artefact that the others are compared with  [default: the first]")
@click.option("--rounds", type=int, default=200, show_default=True, help="Single-user requests of each artefact.")
@click.option("--batch-sizes", type=IntList(), default="8,32", show_default=True, help="Of the throughput.")
@click.option("--batch-rounds", type=int, default=10, show_default=True, help="Batches of each size and artefact.")
@click.option("--top-k", type=int, default=10, show_default=True, help="Items asked for while timing.")
@click.option("--rate", type=float, help="Open load too: requests a second that arrive at random.")
@click.option("--rate-requests", type=int, default=200, show_default=True, help="Requests of the open load.")
@click.option("--max-latency-ms", multiple=True, metavar="[PXX=]MS", help="Bound, such as p50=5; alone it is p99's.")
@click.option("--min-ndcg", type=float, help="Least NDCG@10, as a share of the baseline's.")
@click.option("--max-size-mb", type=float, help="Largest artefact.")
@click.option("--gpu-hour-price", type=float, help="Price of the machine's hour: adds the price of a million lists.")
@click.option("--accuracy/--no-accuracy", default=True, show_default=True, help="Evaluate on all test users.")
@click.option("--floor/--no-floor", default=True, show_default=True, help="Count arithmetic and bytes; CPUs alone.")
@click.option("--device-spec", help="Estimate the floor on a100 or h100 from its data sheet, not on this machine.")
@click.option("--memory/--no-memory", default=True, show_default=True, help="Peak memory, in a process each.")
@common_options
def benchmark(
    *,
    artifacts: tuple[Path, ...],
    data: Path | None,
    output: Path | None,
    baseline: str | None,
    memory: bool,
    max_latency_ms: tuple[str, ...],
    min_ndcg: float | None,
    max_size_mb: float | None,
    as_json: bool,
    force: bool,
    device: str,
    **settings: Any,
) -> None:
    """Accuracy against latency of several artefacts in one run: benchmark.json, .csv, .md and report.html.

    It names the artefact to serve: the fastest that keeps to the bounds, NDCG@10 of 0.99 of the baseline's if none is
    given. It measures anew every time and replaces the last report.
    """
    from slmrec.artifact import Stage, publish
    from slmrec.choice import Constraints, parse_latency
    from slmrec.cli.loading import choose, resolve_output
    from slmrec.config import BenchmarkConfig, settings_of
    from slmrec.report import floor_lines, load_text, markdown_table, require_report_folder, write_report
    from slmrec.report_sources import find_analyses

    bounds = Constraints(max_latency_ms=parse_latency(max_latency_ms), min_ndcg=min_ndcg, max_size_mb=max_size_mb)
    config = BenchmarkConfig(constraints=bounds, **settings)
    target = resolve_output(output, "report")
    require_report_folder(target)
    dataset = _load_data(data)
    names = row_names(artifacts)
    opened = {name: choose(path, "", MADE_BY, *RECOMMENDS) for name, path in zip(names, artifacts, strict=True)}
    analyses = find_analyses(runs_folder(), opened)
    stage = Stage(
        name="benchmark",
        kind="report",
        settings={**settings_of(config), "baseline": baseline},
        parents={"data": dataset.artifact, **opened},
    )
    with publish(target, stage) as folder:
        report = _measure(opened, dataset, config, baseline=baseline, device=device, memory=memory)
        report = replace(report, benchmark={**report.benchmark, "commands": [_command()]}, analyses=analyses)
        write_report(report, folder)
    say(f"wrote {target / 'report.html'} and benchmark.json, .csv and .md beside it")
    chosen = report.benchmark["recommended"]
    text = [*markdown_table(report.benchmark), "", f"to serve: {chosen['name'] or 'none'}: {chosen['reason']}"]
    loads = [f"{row['name']} {load_text(row['load'])}" for row in report.benchmark["rows"] if row["load"]]
    text += [*loads, "", *floor_lines(report.benchmark)]
    print_result(dict(report.benchmark), "\n".join(text).rstrip(), as_json=as_json)


@click.command()
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option(
    "--tolerance", type=float, default=0.01, show_default=True, help="Share by which any figure may be worse."
)
@common_options
def compare(old: Path, new: Path, tolerance: float, as_json: bool, force: bool, device: str, seed: int) -> None:
    """Compare two reports (folders, or their benchmark.json); ends with 1 where the NEW one is worse, for CI.

    Accuracy may fall within the OLD 95 % interval over users, speed-ups within the OLD spread over rounds.
    """
    from slmrec.compare import compare_reports

    if not 0 <= tolerance < 1:
        raise ConfigError(f"tolerance={tolerance} is no share from 0 to 1", remedy="--tolerance 0.01")
    changes = compare_reports(_read_report(old), _read_report(new), tolerance)
    worse = any(change.is_regression for change in changes)
    result = {"regression": worse, "changes": [change.to_json() for change in changes]}
    print_result(result, "\n".join(change.to_text() for change in changes), as_json=as_json)
    if worse:
        raise SystemExit(1)


@click.command()
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@common_options
def diff(old: Path, new: Path, as_json: bool, force: bool, device: str, seed: int) -> None:
    """Say what two artefacts (bundles, graphs, checkpoints, ...) differ in: settings, inputs, versions, files."""
    from slmrec.artifact import open_artifact
    from slmrec.differences import differences

    found = differences(open_artifact(old), open_artifact(new))
    result = {"equal": not found, "differences": [vars(one) for one in found]}
    text = "\n".join(one.to_text() for one in found) or "no difference but dates and places"
    print_result(result, text, as_json=as_json)


def _read_report(path: Path) -> dict[str, Any]:
    from slmrec.compare import require_report

    file = path / "benchmark.json" if path.is_dir() else path
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{file} is no benchmark: {error}", remedy="a folder of slmcompress benchmark") from None
    try:
        require_report(found)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        reason = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise ArtifactError(f"{file} is no benchmark: {reason}", remedy="a folder of slmcompress benchmark") from None
    return found


def row_names(paths: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents before them as it takes to tell them apart.

    >>> row_names([Path("runs/teacher"), Path("a/student"), Path("b/student")])
    ['teacher', 'a/student', 'b/student']
    """
    resolved = [path.resolve() for path in paths]
    twice = next((path for path in resolved if resolved.count(path) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice} is named twice", remedy="name each artefact once")
    longest = max(len(path.parts) for path in resolved)
    tails = [["/".join(path.parts[-depth:]) for path in resolved] for depth in range(1, longest + 1)]
    return [next(tail[index] for tail in tails if tail.count(tail[index]) == 1) for index in range(len(resolved))]


def _load_data(data: Path | None) -> "Dataset":
    from slmrec.cli.loading import choose
    from slmrec.dataset import load_dataset

    return load_dataset(choose(data, "data", "slmcompress data FILE", "dataset").path)


def _measure(
    opened: "dict[str, Artifact]",
    dataset: "Dataset",
    config: "BenchmarkConfig",
    *,
    baseline: str | None,
    device: str,
    memory: bool,
) -> "Report":
    """Load every artefact and run the benchmark; processes that measure memory use the same device."""
    from slmrec.benchmark import Entrant, run_benchmark
    from slmrec.cli.loading import load_recommender
    from slmrec.latency import measure_memory

    def peak(artifact: "Artifact") -> "Memory":
        return measure_memory(artifact.path, dataset.artifact.path, device=device)

    entrants = [Entrant(name, artifact, load_recommender(artifact, device)) for name, artifact in opened.items()]
    return run_benchmark(entrants, dataset, config, baseline=baseline, memory=peak if memory else None, say=say)


def _command() -> str:
    return shlex.join(["slmcompress", *sys.argv[1:]])

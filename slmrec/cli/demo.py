"""demo: the whole pipeline on real input, from nothing to a verified bundle and a report."""

import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from slmrec.cli.options import print_result, say
from slmrec.compress_config import DistillConfig, QuantizeConfig
from slmrec.config import (
    BenchmarkConfig,
    DataConfig,
    ExportConfig,
    RecipeConfig,
    SasrecConfig,
    TeacherConfig,
    TrainConfig,
    WindowConfig,
)

if TYPE_CHECKING:
    from slmrec.artifact import Artifact
    from slmrec.dataset import Dataset

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of every stage of a demo."""

    items: SasrecConfig
    teacher: TeacherConfig
    student: DistillConfig
    benchmark: BenchmarkConfig


@dataclass
class Demo:
    """One run below a folder, with the time each stage took."""

    runs: Path
    force: bool
    seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, stage: str, run: Callable[[], Result]) -> Result:
        """Announce a stage, run it, and remember how long it took."""
        say(f"[{len(self.seconds) + 1}] {stage}")
        start = time.perf_counter()
        result = run()
        self.seconds[stage] = time.perf_counter() - start
        return result


@click.command()
@click.option(
    "--runs",
    type=click.Path(path_type=Path),
    help="Where everything goes  [default: $SLMCOMPRESS_RUNS or runs/demo]",
)
@click.option(
    "--synthetic", is_flag=True, help="Generated data and a tiny random decoder: no download, a minute or two."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object alone on stdout; progress on stderr.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--force", is_flag=True, help="Make everything again.")
def demo(runs: Path | None, synthetic: bool, as_json: bool, seed: int, force: bool) -> None:
    """Everything on real input: ML-100K and SmolLM2-135M become a small, fast, verified recommender.

    A language model's first 8 layers are trained to recommend films, a student of 4 layers is distilled from them,
    made 8-bit, exported with its item head, measured, bundled and verified. About 100 MB are fetched on first use.
    """
    given = click.get_current_context().find_root().params.get("runs")
    runs = runs or given or Path(os.environ.get("SLMCOMPRESS_RUNS") or "runs/demo")
    os.environ["SLMCOMPRESS_RUNS"] = str(runs)
    run = Demo(runs, force)
    from slmrec.cli.demo_input import real_input, synthetic_input

    files, backbone = (synthetic_input if synthetic else real_input)(run, seed)
    recipe = synthetic_recipe(seed, backbone) if synthetic else real_recipe(seed, backbone)
    result = _pipeline(run, files, recipe)
    result["seconds"] = {stage: round(seconds, 1) for stage, seconds in run.seconds.items()}
    print_result(result, _closing(run, result), as_json=as_json)


def real_recipe(seed: int, backbone: str) -> Recipe:
    """Settings timed to end within 20 minutes on two cores."""
    window = WindowConfig(max_history=50, max_events=100)
    decoder = {"learning_rate": 3e-4, "item_learning_rate": 1e-3, "batch_size": 16, "warmup_steps": 20, "seed": seed}
    return Recipe(
        items=SasrecConfig(
            dropout=0.4,
            train=TrainConfig(epochs=27, batch_size=32, learning_rate=2e-3, precision="fp32", seed=seed),
        ),
        teacher=TeacherConfig(
            backbone=backbone,
            num_layers=8,
            recipe=RecipeConfig(prompt="none"),
            window=window,
            train=TrainConfig(epochs=3, **decoder),  # type: ignore[arg-type]
        ),
        student=DistillConfig(num_layers=4, train=TrainConfig(epochs=4, **decoder)),  # type: ignore[arg-type]
        benchmark=BenchmarkConfig(),
    )


def synthetic_recipe(seed: int, backbone: str) -> Recipe:
    """Settings for data with a known answer: every stage should rank it first."""
    train = {"batch_size": 32, "learning_rate": 3e-3, "precision": "fp32", "seed": seed, "warmup_steps": 10}
    return Recipe(
        items=SasrecConfig(dropout=0.1, train=TrainConfig(epochs=12, **train)),  # type: ignore[arg-type]
        teacher=TeacherConfig(
            backbone=backbone,
            num_layers=4,
            recipe=RecipeConfig(prompt="none", titles="none", dropout=0.0),
            train=TrainConfig(epochs=16, **train),  # type: ignore[arg-type]
        ),
        student=DistillConfig(num_layers=2, num_blocks=2, train=TrainConfig(epochs=8, **train)),  # type: ignore[arg-type]
        benchmark=BenchmarkConfig(rounds=100, batch_rounds=5),
    )


def _pipeline(run: Demo, files: "list[Path]", recipe: Recipe) -> dict[str, Any]:
    """Every stage, each from the artefact before it; stages that are up to date are passed over."""
    from compress.distill import distill
    from compress.quantize import quantize, read_gate
    from export.bundle import bundle
    from export.onnx_export import export_checkpoint
    from export.verify import verify
    from slmrec.dataset import load_dataset
    from slmrec.interactions import prepare_dataset
    from slmrec.train_items import train_items
    from slmrec.train_teacher import train_teacher

    at, force = run.runs, run.force
    run.timed("data", lambda: prepare_dataset(files, at / "data", DataConfig(), force=force))
    data = load_dataset(at / "data")
    items, _ = run.timed("train-items", lambda: train_items(data, at / "items", recipe.items, force=force))
    teacher, _ = run.timed(
        "train-teacher", lambda: train_teacher(items, data, at / "teacher", recipe.teacher, force=force)
    )
    student, _ = run.timed("distill", lambda: distill(teacher, data, at / "student", recipe.student, force=force))
    gated = QuantizeConfig(auto_keep=True)
    int8, _ = run.timed("quantize", lambda: quantize(student, data, at / "student-int8", gated, force=force))
    say(read_gate(int8)[1])
    graph, _ = run.timed("export", lambda: export_checkpoint(int8, data, at / "export", ExportConfig(), force=force))
    rows = {"sasrec": items, "teacher": teacher, "student": student, "student-int8-onnx": graph}
    benchmark = run.timed("benchmark", lambda: _benchmark(rows, data, recipe.benchmark, at / "report"))
    # forced, for the report in it is measured anew by every run
    run.timed("bundle", lambda: bundle(graph, data, at / "bundle", report=at / "report", force=True))
    verified = run.timed("verify", lambda: verify(at / "bundle"))
    return {"runs": str(at), "benchmark": benchmark, "verified": verified.to_json()}


def _benchmark(rows: "dict[str, Artifact]", data: "Dataset", config: BenchmarkConfig, output: Path) -> "dict[str, Any]":
    """Measure the rows in turn, the teacher as the baseline, and write the report."""
    from dataclasses import replace

    from slmrec.artifact import Stage, publish
    from slmrec.benchmark import Entrant, run_benchmark
    from slmrec.cli.loading import load_recommender
    from slmrec.config import settings_of
    from slmrec.latency import measure_memory
    from slmrec.report import require_report_folder, write_report
    from slmrec.report_sources import find_analyses

    require_report_folder(output)
    analyses = find_analyses(output.parent, rows)
    entrants = [Entrant(name, artifact, load_recommender(artifact)) for name, artifact in rows.items()]
    report = run_benchmark(
        entrants,
        data,
        config,
        baseline="teacher",
        memory=lambda artifact: measure_memory(artifact.path, data.artifact.path),
        say=say,
    )
    commands = [shlex.join(["slmcompress", *sys.argv[1:]])]
    report = replace(report, benchmark={**report.benchmark, "commands": commands}, analyses=analyses)
    stage = Stage(
        name="benchmark", kind="report", settings=settings_of(config), parents={"data": data.artifact, **rows}
    )
    with publish(output, stage) as folder:
        write_report(report, folder)
    return dict(report.benchmark) | {"example": report.example}


def _closing(run: Demo, result: dict[str, Any]) -> str:
    """The table, one user's lists by title, where everything lies, and how to go on."""
    from slmrec.report import markdown_table

    lines = ["", *markdown_table(result["benchmark"]), ""]
    example = result["benchmark"].pop("example")
    if example is not None:
        lines += [f"One user who had seen {example.num_history} items, the newest: {'; '.join(example.history)}"]
        lines += [f"then saw: {example.target}"]
        for name in ("teacher", "student"):
            titles = (item.title + (" (!)" if item.is_target else "") for item in example.lists[name])
            lines.append(f"  {name} recommends: {'; '.join(titles)}")
    lines += ["", "  ".join(f"{stage} {seconds:.0f} s" for stage, seconds in run.seconds.items())]
    lines += [f"{sum(run.seconds.values()) / 60:.1f} minutes in all", ""]
    lines += [f"report: {run.runs / 'report' / 'report.html'}", f"bundle: {run.runs / 'bundle'} (verified)", ""]
    return "\n".join([*lines, f"export SLMCOMPRESS_RUNS={run.runs}"])

"""slmcompress tune: the fastest version of a checkpoint that keeps to bounds, found by measurement and bundled."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slmrec.cli.bench import IntList, row_names
from slmrec.cli.options import (
    common_options,
    data_option,
    decoder_training_options,
    dry_run_option,
    output_option,
    print_result,
    runs_folder,
    say,
)
from slmrec.config import TrainConfig

if TYPE_CHECKING:
    from slmrec.artifact import Artifact
    from slmrec.cli.candidates import Search
    from slmrec.search import Candidate, Outcome, SearchConfig

FOLDER = "tune"


@click.command()
@click.option("--max-latency-ms", multiple=True, metavar="[PXX=]MS", help="Bound, such as p50=5; alone it is p99's.")
@click.option(
    "--accuracy-gate", "--min-ndcg", "accuracy_gate", default=0.99, show_default=True,
    help="Least NDCG@10 on validation users, as a share of the first checkpoint's.",
)  # fmt: skip
@click.option("--max-size-mb", type=float, help="Largest graph.")
@click.option(
    "-m", "--checkpoint", "--model", "checkpoints", multiple=True, type=click.Path(path_type=Path),
    help="What to start from; may be repeated, the first is the reference  [default: the newest fp32 student]",
)  # fmt: skip
@click.option("--num-layers", type=IntList(), help="Depths to try, such as 3,2  [default: three quarters and half]")
@click.option("--heal-epochs", default=1, show_default=True, help="Of distillation after pruning; 0 trains nothing.")
@click.option("--int8-items/--no-int8-items", default=True, show_default=True, help="Try the 8-bit item table as well.")
@click.option("--max-users", default=2000, show_default=True, help="Validation users that layers are judged by.")
@click.option("--rounds", default=200, show_default=True, help="Single-user requests that a candidate is timed on.")
@decoder_training_options
@data_option
@output_option("tuned-bundle")
@dry_run_option
@common_options
def tune(
    checkpoints: tuple[Path, ...], data: Path | None, output: Path | None, dry_run: bool, device: str, seed: int,
    as_json: bool, force: bool, **flags: Any,
) -> None:  # fmt: skip
    """Search depth, 8 bits and the 8-bit item table for the fastest that keeps to bounds, and bundle it.

    Candidates lie in RUNS/tune, the cheapest to make come first, and what a measured fact excludes is not made. A
    killed search goes on where it was. Everything is chosen on validation users: `slmcompress benchmark` tells what
    the winner does on the test.
    """
    config = _config(flags, seed)
    from slmrec.cli.loading import choose, choose_student, resolve_output
    from slmrec.dataset import load_dataset
    from slmrec.locks import claimed

    target = resolve_output(output, "tuned-bundle")
    if checkpoints:
        named = {
            name.replace("/", "-"): choose(path, "", "slmcompress distill", "checkpoint")
            for name, path in zip(row_names(checkpoints), checkpoints, strict=True)
        }
    else:
        student = choose_student(None, wanted=lambda artifact: "quantize" not in artifact.stages)
        named = {student.path.name: student}
    log = load_dataset(choose(data, "data", "slmcompress data FILE", "dataset").path)
    _require_place(target)
    from slmrec.cli.candidates import Search, base_of
    from slmrec.search import candidates

    plan = candidates([base_of(name, artifact) for name, artifact in named.items()], config)
    if dry_run:
        names = [candidate.name for candidate in plan]
        print_result({"dry_run": True, "candidates": names, "output": str(target)}, "\n".join(names), as_json=as_json)
        return
    folder = runs_folder() / FOLDER
    with claimed(folder):
        folder.mkdir(parents=True, exist_ok=True)
        result, text = _searched(Search(named, log, config, folder, device, force), plan, target)
    print_result(result, text, as_json=as_json)


def _config(flags: dict[str, Any], seed: int) -> "SearchConfig":
    from slmrec.choice import Constraints, parse_latency
    from slmrec.search import SearchConfig

    bounds = Constraints(
        max_latency_ms=parse_latency(flags["max_latency_ms"]),
        min_ndcg=flags["accuracy_gate"],
        max_size_mb=flags["max_size_mb"],
    )
    fields = {name: flags[name] for name in TrainConfig.__dataclass_fields__ if name in flags}
    train = TrainConfig(epochs=max(1, flags["heal_epochs"]), seed=seed, **fields)
    own = {name: flags[name] for name in ("heal_epochs", "int8_items", "max_users", "rounds")}
    return SearchConfig(constraints=bounds, num_layers=flags["num_layers"] or (), train=train, **own)


def _require_place(target: Path) -> None:
    """Refuse an output that no bundle may be put to, before anything is searched."""
    from slmrec.artifact import Stage, is_made

    is_made(target, Stage(name="bundle", kind="bundle", settings={}), force=True)


def _searched(search: "Search", plan: "list[Candidate]", target: Path) -> tuple[dict[str, Any], str]:
    """Run the search and bundle its winner; gives result and text.

    Raises:
        CheckError: no candidate keeps to the bounds; the table has been shown.
    """
    from slmrec.choice import choose
    from slmrec.cli.stages import made, made_text
    from slmrec.search import none_fits, table, to_json

    bounds, reference = search.config.constraints, plan[0].name
    outcomes = search.timed_in_turn(list(search.outcomes(plan)))
    rows = [outcome.row for outcome in outcomes if outcome.row is not None]
    fitting = [row for row in rows if not bounds.broken_by(row)]
    if not fitting:
        say("\n".join([*table(outcomes, bounds, None), _legend(reference, outcomes)]))
        raise none_fits(rows, bounds)
    chosen = choose(fitting, bounds, reference)
    say(f"bundling {chosen['name']}")
    bundled = _bundled(search, search.graphs[chosen["name"]], target)
    lines = table(outcomes, bounds, chosen["name"])
    lines += [_legend(reference, outcomes), "", f"chosen: {chosen['name']}: {chosen['reason']}", made_text(*bundled)]
    found = {
        "reference": reference,
        "bounds": {"max_latency_ms": dict(bounds.max_latency_ms), "max_size_mb": bounds.max_size_mb},
        "accuracy_gate": bounds.min_ndcg,
        "candidates": [to_json(outcome, bounds) for outcome in outcomes],
        "chosen": chosen,
    }
    return made(*bundled) | found, "\n".join(lines)


def _bundled(search: "Search", graph: "Artifact", target: Path) -> "tuple[Artifact, bool]":
    from export.bundle import bundle
    from slmrec.errors import ArtifactError

    try:
        return bundle(graph, search.data, target)
    except ArtifactError:
        if not search.force:
            raise
        return bundle(graph, search.data, target, force=True)


def _legend(reference: str, outcomes: "list[Outcome]") -> str:
    users = next(outcome.row["accuracy"]["num_users"] for outcome in outcomes if outcome.row is not None)
    return f"NDCG@10 against {reference} on {users} validation users; times with a star: alone, not in turn with others"

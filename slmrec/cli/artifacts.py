"""export, bundle, verify and recommend: what a serving team is handed, and how it is asked."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slmrec.bulk_config import ENGINES, BulkConfig
from slmrec.cli.engine_options import engine_config, engine_options
from slmrec.cli.loading import choose, choose_student, load_recommender, provider_of, resolve_output
from slmrec.cli.options import common_options, data_option, model_option, output_option, print_result, runs_folder, say
from slmrec.config import ExportConfig
from slmrec.errors import ConfigError

if TYPE_CHECKING:
    from slmrec.artifact import Artifact

RECOMMENDS = ("checkpoint", "graph", "engine", "bundle")


@click.command()
@click.option("--top-k", type=int, help="Items the graph returns  [default: min(100, items)]")
@click.option("--keep-history", is_flag=True, help="Allow items of the history again (repeat consumption).")
@click.option("--opset", default=20, show_default=True, help="ONNX operator set.")
@click.option("--append/--no-append", default=None, help="A graph for new items of known users  [default: if exact]")
@click.option("--spare-items", default=0.1, show_default=True, help="Room for new items, as a share of the catalogue.")
@click.option("--fold-prefix/--no-fold-prefix", default=True, help="The instruction's keys and values are constants.")
@click.option("--newest-only/--no-newest-only", default=True, help="The last layer runs for the newest token alone.")
@click.option("--fold-items/--no-fold-items", default=True, help="Item vectors are projected at export.")
@click.option("--join-projections/--no-join-projections", default=True, help="Queries, keys, values in one product.")
@click.option("--fuse-kernels/--no-fuse-kernels", default=True, help="ONNX Runtime's own operations; else ONNX alone.")
@click.option("--tune", is_flag=True, help="Choose the kernels of 8-bit layers by measurement on this machine.")
@click.option("--int8-items", is_flag=True, help="8-bit item table first, lists certified to be the fp32 ones.")
@click.option("--block-max/--no-block-max", default=True, help="Top items by way of the maxima of blocks.")
@engine_options
@model_option
@data_option
@output_option("export, or RUNS/engine with --trt")
@common_options
def export(
    model: Path | None, data: Path | None, output: Path | None, trt: bool, device: str, seed: int, as_json: bool,
    force: bool, **flags: Any,
) -> None:  # fmt: skip
    """Write a student as an ONNX graph: history in, top-K items out; checked against the checkpoint.

    --trt builds a TensorRT engine beside the graph, in RUNS/engine. Its precision is placed in a graph of its own,
    whose accuracy is measured before anything is built; where TensorRT cannot build, that graph is kept with what
    builds it elsewhere.
    """
    engine = engine_config(flags, wanted=trt)
    config = ExportConfig(**flags)
    checkpoint = choose_student(model)
    dataset = choose(data, "data", "slmcompress data FILE", "dataset")
    from export.onnx_export import export_checkpoint
    from export.runtime import read_signature
    from slmrec.cli.stages import made, made_text
    from slmrec.dataset import load_dataset

    target = resolve_output(output, "engine" if trt else "export")
    result = export_checkpoint(checkpoint, load_dataset(dataset.path), target, config, engine=engine, force=force)
    signature = read_signature(result[0].path)
    text = f"{made_text(*result)}; {signature['precision']}, top {signature['top_k']} of {signature['num_items']} items"
    fields = made(*result) | {"signature": signature}
    if trt:
        from export.engine_files import engine_text, read_engines

        fields["engine"] = read_engines(result[0].path)
        text += "\n" + engine_text(fields["engine"], result[0].path)
    print_result(fields, text, as_json=as_json)


@click.command()
@click.option("--report", type=click.Path(path_type=Path), help="Benchmark folder to go along  [default: RUNS/report]")
@click.option("--sign", "key", type=click.Path(path_type=Path), help="Private Ed25519 key (PEM) to sign with.")
@model_option
@data_option
@output_option("bundle")
@common_options
def bundle(
    model: Path | None, data: Path | None, output: Path | None, report: Path | None, key: Path | None, device: str,
    seed: int, as_json: bool, force: bool,
) -> None:  # fmt: skip
    """Put a graph, its contract, golden answers and measurements into one folder to hand over."""
    graph = choose(model, "export", "slmcompress export", "graph", "engine")
    dataset = choose(data, "data", "slmcompress data FILE", "dataset")
    from export.bundle import bundle as run
    from slmrec.cli.stages import made, made_text
    from slmrec.dataset import load_dataset

    report = report or _report_of(graph)
    result = run(
        graph, load_dataset(dataset.path), resolve_output(output, "bundle"), report=report, key=key, force=force
    )
    print_result(made(*result), made_text(*result), as_json=as_json)


@click.command("update-items")
@click.argument("path", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--items", type=click.Path(path_type=Path), help="New items: .parquet or .jsonl.")
@click.option("--retire", type=click.Path(path_type=Path), help="Text file of ids never to be recommended again.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The new bundle.")
@click.option("--sign", "key", type=click.Path(path_type=Path), help="Private Ed25519 key (PEM) to sign with.")
@common_options
def update_items(
    path: Path, items: Path | None, retire: Path | None, output: Path, key: Path | None, device: str, seed: int,
    as_json: bool, force: bool,
) -> None:  # fmt: skip
    """Let items join and leave the catalogue of a BUNDLE, without retraining and without a new export.

    A new item has an `item` id, a `title` if known, and either `similar` (ids whose mean it becomes) or its own
    `vector` (where items have no share from titles). What was measured on the old catalogue, engines and the old
    signature do not go along.
    """
    parent = choose(path, "bundle", "slmcompress bundle", "bundle")
    from export.runtime import read_signature
    from export.signing import SIGNED_FILE
    from export.update import update_items as run
    from slmrec.cli.stages import made, made_text

    result = run(parent, output, items=items, retire=retire, key=key, force=force)
    signature = read_signature(result[0].path)
    room = signature["capacity"] - signature["num_items"]
    text = f"{made_text(*result)}; {signature['num_items']} items, room for {room} more"
    if key is None and (parent.path / SIGNED_FILE).exists():
        text += "; not signed any more (--sign)"
    fields = {"num_items": signature["num_items"], "room": room, "signed": key is not None}
    print_result(made(*result) | fields, text, as_json=as_json)


@click.command()
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--key", type=click.Path(path_type=Path), help="Public Ed25519 key (PEM): unsigned bundles fail.")
@common_options
def verify(path: Path | None, key: Path | None, device: str, seed: int, as_json: bool, force: bool) -> None:
    """Check a bundle on the machine that will serve it: every byte, then the golden answers."""
    if path is None:
        path = runs_folder() / "bundle"
        say(f"using {path}")
    from export.verify import verify as run

    verified = run(path, key=key, provider=provider_of(device))
    print_result(verified.to_json(), verified.to_text(), as_json=as_json)


@click.command()
@click.argument("history", nargs=-1)
@click.option("-k", "top_k", default=10, show_default=True, help="Items to recommend.")
@click.option("--exclude", multiple=True, help="Item that must not be recommended; may be repeated.")
@click.option(
    "--input",
    "source",
    type=click.Path(path_type=Path),
    help="File of requests: .jsonl, .csv or .parquet; or a folder of .parquet.",
)
@click.option(
    "--output",
    "target",
    type=click.Path(path_type=Path),
    help="File of answers, in the input's order; or a folder of shards.",
)
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="local",
    show_default=True,
    help="What fills a folder: this process, or workers of Ray Data.",
)
@click.option("--shard-users", default=16_384, show_default=True, help="Users of a shard at most.")
@click.option("--workers", type=int, help="Of Ray  [default: one for each core, or GPU]")
@model_option
@common_options
def recommend(
    history: tuple[str, ...], top_k: int, exclude: tuple[str, ...], source: Path | None, target: Path | None,
    engine: str, shard_users: int, workers: int | None, model: Path | None, device: str, seed: int, as_json: bool,
    force: bool,
) -> None:  # fmt: skip
    """Recommend items after a HISTORY of external ids or exact titles, oldest first, or for a whole file.

    A line of --input is {"user": .., "history": [ids, oldest first], "exclude": [..]}; of --output {"user": ..,
    "items": [ids, best first], "scores": [..]}. In CSV a list is ids with spaces between them, or JSON.

    An --output without an ending is a folder of shards, for millions of users in Parquet: the same command goes on
    where a killed one ended.
    """
    if bool(history) == (source is not None) or (source is None) != (target is None):
        raise ConfigError(
            "recommend takes either a history or --input and --output", remedy="slmcompress recommend 50 172"
        )
    if exclude and source is not None:
        raise ConfigError(
            "--exclude is for a history on the command line; in a file each user has a field of his own",
            remedy='lines such as {"user": "1", "history": ["50"], "exclude": ["172"]}',
        )
    artifact = choose(model, "", "slmcompress export", *RECOMMENDS) if model else _newest_product()
    if source is None or target is None:
        _recommend_one(artifact, history, exclude, top_k, device=device, as_json=as_json)
        return
    from slmrec.cli.bulk import recommend_shards, wants_folder

    config = BulkConfig(top_k=top_k, engine=engine, shard_users=shard_users, workers=workers)
    if wants_folder(source, target, engine):
        recommend_shards(artifact, (source, target), config, device=device, force=force, as_json=as_json)
        return
    from export.requests import recommend_file
    from slmrec.catalogue import load_catalogue

    recommender, items = load_recommender(artifact, device), load_catalogue(artifact.path)
    users = recommend_file(recommender, items, source, target, top_k, force=force)
    print_result({"output": str(target), "num_users": users}, f"{target}: {users} users", as_json=as_json)


def _recommend_one(
    artifact: "Artifact", history: tuple[str, ...], exclude: tuple[str, ...], top_k: int, *, device: str, as_json: bool
) -> None:
    """Print the list of one history."""
    from export.requests import named_items
    from slmrec.catalogue import load_catalogue
    from slmrec.ragged import Ragged
    from slmrec.recommender import Histories

    items = load_catalogue(artifact.path)
    seen, excluded = items.to_internal(history), items.to_internal(exclude)
    request = Histories(Ragged.from_rows([seen]), Ragged.from_rows([excluded]))
    answer = load_recommender(artifact, device).recommend(request, top_k)
    ids, scores = named_items(answer, 0, items)
    titles = [items.title_of(items.internal_ids[item_id]) for item_id in ids]
    if not ids:
        say("nothing is left to recommend: every item is in the history or excluded")
    lines = [
        f"{n:>3}  {item:<12} {score:8.3f}  {title}"
        for n, (item, score, title) in enumerate(zip(ids, scores, titles, strict=True), 1)
    ]
    print_result({"items": ids, "scores": scores, "titles": titles}, "\n".join(lines), as_json=as_json)


def _report_of(graph: "Artifact") -> Path | None:
    """RUNS/report, if it is a benchmark of this graph."""
    report = runs_folder() / "report"
    if not (report / "manifest.json").is_file():
        return None
    from slmrec.artifact import read_manifest

    parents = read_manifest(report)["parents"].values()
    if not any(parent["hash"] == graph.hash for parent in parents):
        say(f"{report} did not measure {graph.path}: the bundle goes without figures")
        return None
    return report


def _newest_product() -> "Artifact":
    """The newest bundle or graph below RUNS, else the newest student."""
    from slmrec.artifact import find_artifacts

    products = [
        artifact for artifact in find_artifacts(runs_folder()) if artifact.kind in ("bundle", "graph", "engine")
    ]
    if not products:
        return choose_student(None)
    say(f"using {products[0].path}")
    return choose(products[0].path, "", "slmcompress export", *RECOMMENDS)

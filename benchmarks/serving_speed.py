"""How fast the serving graph is: against its peers, and what each of its transformations gives.

    python benchmarks/serving_speed.py peers
    python benchmarks/serving_speed.py ablation
    python benchmarks/serving_speed.py append
    python benchmarks/serving_speed.py peers --lengths FOLDER/sequences.txt      # real lengths, batch 1

The first layers of SmolLM2 with the paper's prompt, a full window of 30 items, a catalogue of Beauty's size (12,101
items of 64 dimensions; random vectors), two threads; `append` is a new item after 50, against all 51 at once.
Contestants answer in turn, each in a process of its own; ratios are those of one round, their median and spread over
rounds.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contest import Contestant, contest, ratios
from recording import record

from compress.int8 import quantize_model
from export.onnx_export import export_model
from slmrec.config import ExportConfig, RecipeConfig
from slmrec.metrics import overlap
from slmrec.models.decoder import DecoderModel, DecoderSpec, decoder_settings
from slmrec.models.prompt import prompt_embeddings
from slmrec.train_teacher import load_backbone, pretrained_model

NUM_ITEMS, ITEM_DIM, WINDOW, TEACHER_LAYERS = 12_101, 64, 30, 30
TRANSFORMATIONS = ("fold_prefix", "newest_only", "fold_items", "join_projections", "fuse_kernels", "block_max")
HERE = Path(__file__).parent


def student(num_layers: int, window: int = WINDOW) -> DecoderModel:
    """A decoder recommender of pretrained layers and a random item table."""
    backbone = load_backbone("smollm2-135m", num_layers)
    texts = prompt_embeddings(backbone.folder, backbone.embeddings, "slmrec")
    torch.manual_seed(0)
    spec = DecoderSpec(
        decoder=decoder_settings(backbone.decoder.config, num_layers),
        recipe=RecipeConfig(prompt="slmrec", titles="none", supervision="last"), num_items=NUM_ITEMS, item_dim=ITEM_DIM,
        max_history=window, prefix_length=len(texts[0]), suffix_length=len(texts[1]), has_titles=False,
        backbone=backbone.name,
    )  # fmt: skip
    model = pretrained_model(spec, backbone, texts)
    with torch.no_grad():
        model.item_table.weight.normal_()
        model.item_proj.weight.mul_(backbone.token_rms / model.item_proj.weight.std() / ITEM_DIM**0.5)
    return model.eval()


@torch.no_grad()
def plain_folder(model: DecoderModel, folder: Path) -> Path:
    """The model as any toolchain takes it: a transformers decoder over words and items, and its head."""
    from transformers import AutoConfig, AutoModel

    vectors = model.item_inputs(torch.arange(1, NUM_ITEMS + 1))
    words = torch.cat([model.prefix, model.suffix, vectors])
    config = AutoConfig.for_model(**dict(model.spec.decoder) | {"vocab_size": len(words)})
    decoder = AutoModel.from_config(config, dtype=torch.float32)
    decoder.load_state_dict({**model.decoder.state_dict(), "embed_tokens.weight": words})
    decoder.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    written["rope_theta"] = model.spec.decoder["rope_theta"]  # where transformers 4 reads it
    (folder / "config.json").write_text(json.dumps(written), encoding="utf-8")
    assert model.user_proj is not None
    np.savez(
        folder / "head.npz", user_proj=model.user_proj.weight.T.numpy(), outputs=model.item_outputs().numpy(),
        prefix_length=len(model.prefix), suffix_length=len(model.suffix),
    )  # fmt: skip
    return folder


def graph_folder(model: DecoderModel, folder: Path, **settings: bool) -> Path:
    """An exported graph of the model."""
    folder.mkdir()
    export_model(model, folder, replace(ExportConfig(append=False), **settings))  # type: ignore[arg-type]
    return folder


def real_lengths(sequences: Path, count: int = 64) -> np.ndarray:
    """Lengths of test histories (`user item item ...` lines, the last left out), drawn at random, cut to the window."""
    lines = sequences.read_text(encoding="utf-8").splitlines()
    lengths = np.array([len(line.split()) - 2 for line in lines])
    drawn = np.random.default_rng(0).choice(lengths[lengths >= 1], count)
    return np.minimum(drawn, WINDOW)


def write_requests(folder: Path, batch_sizes: list[int], window: int = WINDOW, batches: int = 32) -> dict[str, Path]:
    """Random full windows."""
    generator, paths = np.random.default_rng(0), {}
    for size in batch_sizes:
        rows = generator.random((batches, size, NUM_ITEMS)).argpartition(window, axis=2)[..., :window] + 1
        paths[f"batch {size}"] = folder / f"requests-{size}.npz"
        np.savez(paths[f"batch {size}"], item_ids=rows.astype(np.int64))
    return paths


def own(*arguments: object) -> Contestant:
    """A contestant of this environment."""
    return Contestant([sys.executable, str(HERE / "contestant.py"), *map(str, arguments)])


def foreign(peer: str, *arguments: object) -> Contestant:
    """A contestant of a peer's environment, see `peers/README.md`."""
    home = HERE / "peers" / peer
    command = [str(home / ".venv/bin/python"), str(home / "contestant.py"), *map(str, arguments)]
    return Contestant(command, os.environ | {"PYTHONPATH": str(HERE)})


def peers(runs: Path) -> dict[str, Contestant]:
    """Who runs against the graphs."""
    whole = student(4)
    plain = plain_folder(whole, runs / "plain-4")
    return {
        "teacher, 30 layers, eager": own("eager", plain_folder(student(TEACHER_LAYERS), runs / "plain-30")),
        "eager": own("eager", plain),
        "torch.compile": own("eager", plain, "--compile"),
        "optimum-onnx, fp32": foreign("optimum", plain, "fp32"),
        "optimum-onnx, int8": foreign("optimum", plain, "int8"),
        "OpenVINO, fp32": foreign("openvino", plain, "fp32"),
        "OpenVINO, int8": foreign("openvino", plain, "int8"),
        "graph, fp32": own("graph", graph_folder(whole, runs / "fp32")),
        "graph, 8-bit": own("graph", graph_folder(quantize_model(whole), runs / "int8")),
    }


def ablation(runs: Path) -> dict[str, Contestant]:
    """Each transformation alone, and all but each."""
    model, none = student(4), dict.fromkeys(TRANSFORMATIONS, False)
    settings: dict[str, dict[str, bool]] = {"none": none, "all": {}}
    for name in TRANSFORMATIONS:
        settings[f"{name} alone"] = none | {name: True}
        settings[f"all but {name}"] = {name: False}
    folders = {name: graph_folder(model, runs / name.replace(" ", "-"), **flags) for name, flags in settings.items()}
    eight = quantize_model(model)
    folders["all, 8-bit"] = graph_folder(eight, runs / "int8")
    folders["all but fuse_kernels, 8-bit"] = graph_folder(eight, runs / "int8-unfused", fuse_kernels=False)
    return {name: own("graph", folder) for name, folder in folders.items()}


def append(runs: Path) -> dict[str, Contestant]:
    """A user who comes back, in fp32 and in 8 bits."""
    model, found = student(4, 51), {}
    for name, one in (("fp32", model), ("8-bit", quantize_model(model))):
        folder = graph_folder(one, runs / name, append=True)
        found[f"whole history, {name}"] = own("graph", folder)
        found[f"append, {name}"] = own("append", folder)
    return found


def measure(what: str, runs: Path, rounds: int, lengths: np.ndarray | None) -> dict[str, Any]:
    """Start everyone, let them run, and compare."""
    sizes = {"peers": [1, 32], "ablation": [1, 8], "append": [1]}[what] if lengths is None else [1]
    if lengths is None:
        requests = write_requests(runs, sizes, *((51, 1) if what == "append" else ()))
    else:
        requests = write_requests(runs, sizes, batches=len(lengths))
        with np.load(requests["batch 1"]) as stored:
            np.savez(requests["batch 1"], item_ids=stored["item_ids"], lengths=lengths)
    contestants = {"peers": peers, "ablation": ablation, "append": append}[what](runs)
    if lengths is not None:  # it compiles anew for every length
        contestants.pop("torch.compile").close()
    baseline = {"peers": "eager", "ablation": "none", "append": "whole history, fp32"}[what]
    medians = contest(contestants, requests, rounds)
    lists = {name: one.lists(requests[f"batch {sizes[-1]}"]) for name, one in contestants.items()}
    for contestant in contestants.values():
        contestant.close()
    result: dict[str, Any] = {
        "baseline": baseline, "rounds": rounds,
        "ratios": {size: ratios(found, baseline) for size, found in medians.items()},
        "overlap@10": {name: float(overlap(found, lists[baseline]).mean()) for name, found in lists.items()},
    }  # fmt: skip
    if what == "peers":
        for graph in ("graph, 8-bit", "graph, fp32"):
            result[f"{graph}, against"] = {
                size: {name: ratios(found, name)[graph] for name in found} for size, found in medians.items()
            }
    if what == "append":
        eight = {size: ratios(found, "whole history, 8-bit")["append, 8-bit"] for size, found in medians.items()}
        result["append, 8-bit, against whole history, 8-bit"] = eight
    return result


def main() -> None:
    """Let them run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["peers", "ablation", "append"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--lengths", type=Path, help="sequences.txt whose lengths histories have; for peers")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lengths = real_lengths(arguments.lengths) if arguments.lengths else None
        result = measure(arguments.what, Path(folder), arguments.rounds, lengths)
    if lengths is not None:
        result["mean_length"] = float(lengths.mean())
    record(f"serving_{arguments.what}{'_lengths' if lengths is not None else ''}", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

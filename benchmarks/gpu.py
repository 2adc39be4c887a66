"""One script for an A100 or H100: what the serving transformations, narrow types and stored features give there.

    python benchmarks/gpu.py all --out gpu-results              # on a GPU machine
    python benchmarks/gpu.py all --out gpu-dry --dry-run        # tiny, on a CPU: proves that it runs

Parts (each takes at most 8 minutes and is kept in OUT/PART.json; what is there is not measured again):

* latency: LLaMA-2-7B's shapes with random weights. E4SRec with 32 and 8 layers and SLMRec with 4 as published (the
  instruction computed with every request, scores of all items and top-K), against 4 layers served as here: instruction
  folded, last layer for the newest token, one product for queries, keys and values; eager, compiled and as CUDA graphs.
* runtimes: the exported graph of the same shapes in fp16, by ONNX Runtime's CUDA provider and by TensorRT, where they
  are installed; what is not is named.
* head: scores of a catalogue and its best 100, flat top-K against block maxima, beside the floor of one reading.
* training: a training step of E4SRec-32 (LoRA) against a distillation step of the 4-layer student with stored features
  and with a live 8-layer teacher.
* precision: NDCG@10 of a trained student in fp32, TF32, fp16 and bf16 (RUNS of a finished demo; left out without).

Needs torch and transformers; contestants in turn, times by device events.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_models import Head, Published, Served, Sizes, narrow
from torch import Tensor, nn
from torch.nn import functional

SMALL = Sizes(64, 128, 4, 6, (1, 4), (500, 20_000), 9, 6, 3, 2)


def timed(contestants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of each contestant, in turn round by round, after three calls that are not counted."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for call in contestants.values():
        for _ in range(3):
            call()
    for _ in range(rounds):
        for name, call in contestants.items():
            found[name].append(_once(call, device))
    first = next(iter(found))
    return {
        name: {
            "p50_ms": float(np.median(own)), "p90_ms": float(np.percentile(own, 90)),
            "faster_than_first": float(np.median(np.array(found[first]) / np.array(own))),
        }
        for name, own in found.items()
    }  # fmt: skip


def _once(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    torch.cuda.synchronize()
    return float(before.elapsed_time(after))


def as_cuda_graph(call: Callable[[Tensor], object], example: Tensor) -> Callable[[], object]:
    """The call recorded once and replayed; on a CPU the call itself."""
    if example.device.type != "cuda":
        return lambda: call(example)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(example)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(example)
    return graph.replay


@torch.inference_mode()
def latency(sizes: Sizes, device: torch.device, _: Path | None) -> dict[str, Any]:
    """Every contestant at every batch and catalogue; answers of ours are checked against the published ones."""
    models = {f"E4SRec-{depth}, as published": Published(sizes, depth, device) for depth in (sizes.teacher_layers, 8)}
    student = models["SLMRec-4, as published"] = Published(sizes, 4, device)
    ours = Served(student)
    compiled = torch.compile(ours, dynamic=False) if device.type == "cuda" else ours
    found: dict[str, Any] = {"agreement": _agreement(student, ours, sizes, device)}
    for num_items in sizes.catalogues:
        heads = {by_blocks: Head(num_items, sizes.hidden, device, by_blocks=by_blocks) for by_blocks in (False, True)}
        for batch in sizes.batches:
            vectors = torch.randn(batch, sizes.history, sizes.hidden, device=device, dtype=narrow(device))
            contestants: dict[str, Callable[[], object]] = {
                name: partial(_answer, model, heads[False], vectors) for name, model in models.items()
            }
            served, fast = (partial(_answer, model, heads[True]) for model in (ours, compiled))
            contestants["SLMRec-4, served here, eager"] = partial(served, vectors)
            contestants["SLMRec-4, served here, CUDA graph"] = as_cuda_graph(served, vectors)
            contestants["SLMRec-4, served here, compiled, CUDA graph"] = as_cuda_graph(fast, vectors)
            rounds = sizes.rounds if batch < 512 else max(3, sizes.rounds // 4)
            key = f"batch {batch}, {num_items} items"
            found[key] = timed(contestants, rounds, device)
            for row in found[key].values():
                row["users_per_s"] = 1000 * batch / row["p50_ms"]
            print(json.dumps({key: found[key]}), flush=True)
    found["memory_bytes"] = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return found


def _answer(model: nn.Module, head: nn.Module, vectors: Tensor) -> object:
    return head(model(vectors))


def _agreement(student: Published, ours: Served, sizes: Sizes, device: torch.device) -> float:
    """Largest difference of user vectors, as a share of their scale."""
    vectors = torch.randn(2, sizes.history, sizes.hidden, device=device, dtype=narrow(device))
    expected, found = student(vectors).float(), ours(vectors).float()
    gap = float((expected - found).abs().max() / expected.abs().max())
    if not gap < 0.05:
        raise SystemExit(f"the served layers do not answer as the published ones: {gap}")
    return gap


@torch.inference_mode()
def head(sizes: Sizes, device: torch.device, _: Path | None) -> dict[str, Any]:
    """The item head alone against its floor: one reading of the table, no score matrix."""
    bandwidth = _bandwidth(device)
    found: dict[str, Any] = {"read_bytes_s": bandwidth}
    for num_items in sizes.catalogues:
        for batch in sizes.batches:
            users = torch.randn(batch, 64, device=device, dtype=narrow(device))
            contestants: dict[str, Callable[[], object]] = {}
            for name, by_blocks in (("matmul and topk", False), ("block maxima", True)):
                one = Head(num_items, 64, device, by_blocks=by_blocks)
                contestants[name] = partial(one, users)
                contestants[f"{name}, CUDA graph"] = as_cuda_graph(one, users)
            times = timed(contestants, sizes.rounds, device)
            floor_ms = 1000 * num_items * 64 * users.element_size() / bandwidth
            found[f"batch {batch}, {num_items} items"] = times | {"floor_ms": floor_ms}
    return found


def _bandwidth(device: torch.device) -> float:
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.ones(size // 4, device=device)
    return size / (min(_once(source.sum, device) for _ in range(10)) / 1000)


def runtimes(sizes: Sizes, device: torch.device, _: Path | None) -> dict[str, Any]:
    """The exported graph by other runtimes, in turn at each batch; copies to and from the device included."""
    from export.engine import place
    from export.sessions import loadable_providers, open_session
    from slmrec.config import ExportConfig
    from slmrec.engine_config import EngineConfig

    largest = sizes.batches[-1]
    shapes: Any = {
        kind: {"item_ids": (batch, sizes.history), "exclude_ids": (batch, 32)}
        for kind, batch in (("min", 1), ("opt", largest), ("max", largest))
    }
    wanted, found = ("CUDAExecutionProvider", "TensorrtExecutionProvider"), {}
    with tempfile.TemporaryDirectory() as folder:
        model, engine = _random_student(sizes), EngineConfig(precision="fp16")
        placed = place(model, Path(folder), ExportConfig(), engine, {}, shapes)
        names = [one for one in loadable_providers() if one in wanted or device.type != "cuda"]
        names = [one for one in names if one != "AzureExecutionProvider"]
        sessions = {name: open_session(placed.folder / "model.onnx", name, 8) for name in names}
        found["left out"] = [one for one in wanted if one not in names]
        session = _engine(placed.folder, placed.recipe)
        if isinstance(session, str):
            found["left out"].append(f"TensorRT: {session}")
        else:
            sessions["TensorRT"] = session
        generator = np.random.default_rng(0)
        for batch in sizes.batches:
            request = {
                "item_ids": generator.integers(1, sizes.catalogues[0], (batch, sizes.history)),
                "exclude_ids": np.zeros((batch, 32), dtype=np.int64),
            }
            calls = {name: partial(one.run, ["top_items", "top_scores"], request) for name, one in sessions.items()}
            if calls:
                found[f"batch {batch}"] = timed(calls, sizes.rounds, torch.device("cpu"))
    return found


def _random_student(sizes: Sizes) -> Any:
    """Four layers of these shapes as the project's own model."""
    from transformers import AutoConfig

    from slmrec.config import RecipeConfig
    from slmrec.models.decoder import DecoderModel, DecoderSpec, decoder_settings

    config = AutoConfig.for_model(
        "llama", hidden_size=sizes.hidden, intermediate_size=sizes.mlp, num_hidden_layers=4, vocab_size=64,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.heads, max_position_embeddings=4096,
    )  # fmt: skip
    suffix = min(5, sizes.prompt - 1)
    spec = DecoderSpec(
        decoder=decoder_settings(config, 4), recipe=RecipeConfig(prompt="slmrec", titles="none", supervision="last"),
        num_items=sizes.catalogues[0], item_dim=64, max_history=sizes.history, prefix_length=sizes.prompt - suffix,
        suffix_length=suffix, has_titles=False, backbone="random",
    )  # fmt: skip
    return DecoderModel(spec).eval()


def _engine(folder: Path, recipe: dict[str, Any]) -> Any:
    """A TensorRT session of the placed graph, or why there is none."""
    from export.build_engine import BuildError, build, has_driver, load
    from export.engine_runtime import EngineSession

    try:
        trt = load("tensorrt")
    except BuildError as error:
        return str(error)
    if not has_driver():
        return "no driver"
    plan = folder / "model.plan"
    plan.write_bytes(build(trt, folder / "model.onnx", recipe)[0])
    return EngineSession(plan, {"flavor": "tensorrt", "version_compatible": False})


def training(sizes: Sizes, device: torch.device, _: Path | None) -> dict[str, Any]:
    """Steps of teacher and student; the student's features stored or asked of an 8-layer teacher at every step."""
    from peft import LoraConfig, get_peft_model

    def adapted(num_layers: int) -> nn.Module:
        model = Published(sizes, num_layers, device).train()
        wanted = ["q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model.decoder = get_peft_model(model.decoder, LoraConfig(r=8, lora_alpha=16, target_modules=wanted))
        return model

    table = torch.randn(sizes.catalogues[0], sizes.hidden, device=device, dtype=narrow(device))
    vectors = torch.randn(sizes.training_batch, sizes.history, sizes.hidden, device=device, dtype=narrow(device))
    targets = torch.randint(len(table), (sizes.training_batch,), device=device)
    teacher, student = adapted(sizes.teacher_layers), adapted(4)
    live = Published(sizes, 8, device)
    stored = torch.randn(sizes.training_batch, sizes.hidden, device=device, dtype=narrow(device))

    def step(model: nn.Module, features: Callable[[], Tensor] | None) -> None:
        users = model(vectors) if not hasattr(model.decoder, "base_model") else _states(model, vectors)
        loss = functional.cross_entropy((users @ table.T).float(), targets)
        if features is not None:
            loss = loss + (1 - functional.cosine_similarity(users, features(), dim=-1)).mean()
        loss.backward()
        model.zero_grad(set_to_none=True)

    def asked() -> Tensor:
        with torch.no_grad():
            return live(vectors)  # type: ignore[no-any-return]

    found = timed(
        {
            "E4SRec-32, training step": lambda: step(teacher, None),
            "SLMRec-4, distillation step, live teacher of 8": lambda: step(student, asked),
            "SLMRec-4, distillation step, stored features": lambda: step(student, lambda: stored),
        },
        max(3, sizes.rounds // 2), device,
    )  # fmt: skip
    tokens = sizes.training_batch * sizes.tokens
    return {name: row | {"tokens_per_s": 1000 * tokens / row["p50_ms"]} for name, row in found.items()}


def _states(model: nn.Module, vectors: Tensor) -> Tensor:
    decoder = model.decoder.get_base_model()  # type: ignore[operator, union-attr]
    prompt = decoder.embed_tokens.weight[:1].expand(len(vectors), model.sizes.prompt, -1)  # type: ignore[union-attr]
    states = decoder(inputs_embeds=torch.cat([prompt, vectors], dim=1), use_cache=False).last_hidden_state
    return states[:, -1]  # type: ignore[no-any-return]


def precision(_: Sizes, device: torch.device, runs: Path | None) -> dict[str, Any]:
    """NDCG@10 of a trained student as PyTorch computes it in each type; of all test users."""
    if runs is None:
        return {"left out": "no --runs of a finished demo"}
    from slmrec.artifact import open_artifact
    from slmrec.dataset import load_dataset
    from slmrec.evaluate import TEST_PROTOCOL, evaluate
    from slmrec.models.checkpoint import load_decoder
    from slmrec.models.ranking import TorchRecommender
    from slmrec.sequences import test_cases

    data, found = load_dataset(runs / "data"), {}
    for name, dtype, tf32 in (
        ("fp32", torch.float32, False), ("TF32", torch.float32, True), ("fp16", torch.float16, False),
        ("bf16", torch.bfloat16, False),
    ):  # fmt: skip
        torch.backends.cuda.matmul.allow_tf32 = tf32
        model = load_decoder(open_artifact(runs / "student")).eval().to(dtype)
        accuracy = evaluate(TorchRecommender(model, device.type), test_cases(data.sequences), protocol=TEST_PROTOCOL)
        found[name] = {"ndcg@10": accuracy.metrics["ndcg@10"].estimate}
        print(json.dumps({name: found[name]}), flush=True)
    return found


PARTS: dict[str, Callable[[Sizes, torch.device, Path | None], dict[str, Any]]] = {
    "latency": latency, "head": head, "runtimes": runtimes, "training": training, "precision": precision,
}  # fmt: skip


def main() -> None:
    """Measure the parts that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "all"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU too")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not arguments.dry_run:
        raise SystemExit("no GPU is here; --dry-run proves that the script runs")
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU: proves that the script runs, no more"
    about = {
        "device": name, "torch": torch.__version__, "dry_run": arguments.dry_run,
    }  # fmt: skip
    for part in PARTS if "all" in arguments.parts else arguments.parts:
        target = arguments.out / f"{part}.json"
        if target.exists():
            print(f"{target} is there", flush=True)
            continue
        start = time.perf_counter()
        found = PARTS[part](SMALL if arguments.dry_run else Sizes(), device, arguments.runs)
        partial = target.with_suffix(".partial")
        partial.write_text(
            json.dumps(about | {"seconds": round(time.perf_counter() - start, 1), part: found}, indent=2)
        )
        partial.rename(target)
        print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()

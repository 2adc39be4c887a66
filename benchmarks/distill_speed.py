"""What the teacher-feature store saves, and what a shallow student's step costs beside its deep teacher's.

    python benchmarks/distill_speed.py --rounds 15

ML-100K windows of 50, batches of 64 (--batch-size), no prompt, bfloat16 where the processor has it. Contestants take
turns on the same batches: a distillation step with stored features, with an 8-layer teacher asked at every step, with a
30-layer one; the decoder's part of a training step (forward and backward, no item head) at 4 and at 30 layers; whole
training steps.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recording import record
from slmrec_table import prepared

from compress.distill import store_spec
from compress.features import FeatureStore, StoreSpec, build_store, teacher_says
from compress.objective import DistillObjective, with_teacher
from compress.student import build_student
from slmrec.compress_config import DistillConfig
from slmrec.config import RecipeConfig, TrainConfig, WindowConfig
from slmrec.dataset import Dataset
from slmrec.models.decoder import DecoderModel, DecoderSpec, decoder_settings
from slmrec.samples import NextItemObjective, Samples, training_samples
from slmrec.sequences import length_batches
from slmrec.train import Batch, computes_bfloat16
from slmrec.train_teacher import load_backbone

TRAIN = TrainConfig(epochs=1, batch_size=64, learning_rate=1e-5)


def build(num_layers: int, num_items: int) -> DecoderModel:
    """A teacher with pretrained layers and a random item table, small as a trained one's.

    Speed does not ask what it learned, but exponentials of the huge scores of a table of variance 1 underflow, slowly.
    """
    backbone = load_backbone("smollm2-135m", num_layers)
    spec = DecoderSpec(
        decoder=decoder_settings(backbone.decoder.config, num_layers),
        recipe=RecipeConfig(prompt="none", titles="none"), num_items=num_items, item_dim=64, max_history=50,
        prefix_length=0, suffix_length=0, has_titles=False, backbone="smollm2-135m",
    )  # fmt: skip
    model = DecoderModel(spec)
    model.decoder.load_state_dict({n: v for n, v in backbone.decoder.state_dict().items() if "embed_tokens" not in n})
    torch.nn.init.normal_(model.item_table.weight, std=0.05)
    return model


def half() -> Any:
    """bfloat16 where the processor computes it."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=computes_bfloat16(torch.device("cpu")))


def trained(objective: torch.nn.Module, fields: Callable[[], Batch], optimizer: torch.optim.Optimizer) -> None:
    """One whole step."""
    with half():
        loss = torch.stack(list(objective(fields()).values())).sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def decoder_only(model: DecoderModel, batch: Batch) -> None:
    """Forward and backward of the decoder, from the item vectors to the last state."""
    with half():
        state = model(batch.item_ids)[-1]
    state.float().pow(2).mean().backward()
    model.zero_grad(set_to_none=True)


def asked(teacher: DecoderModel, batch: Batch, spec: StoreSpec) -> Batch:
    """A batch with what a live teacher says, computed as fast as it can be."""
    with half():
        return with_teacher(batch, teacher_says(teacher, batch, spec), has_prefix=False)


def contestants(data: Dataset, samples: Samples, store_folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Name -> what is done with a batch's rows; and facts about them."""
    teachers = {depth: build(depth, data.num_items).eval() for depth in (8, 30)}
    config = DistillConfig(num_layers=4, train=TRAIN)
    student = build_student(teachers[8], config)
    objective = DistillObjective(student, config, teachers[8].hidden_size).train()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-5, fused=True)
    deep = build(30, data.num_items).train()
    deep_optimizer = torch.optim.AdamW(deep.parameters(), lr=1e-5, fused=True)
    plain = NextItemObjective(student)
    specs = {depth: store_spec(teacher, config) for depth, teacher in teachers.items()}
    store, store_seconds = built(teachers[8], samples, specs[8], store_folder)

    def with_features(depth: int) -> Callable[[np.ndarray], None]:
        return lambda rows: trained(
            objective, lambda: asked(teachers[depth], samples.batch(rows), specs[depth]), optimizer
        )

    steps: dict[str, Callable[[np.ndarray], None]] = {
        "stored": lambda rows: trained(
            objective, lambda: with_teacher(samples.batch(rows), store.read(rows), has_prefix=False), optimizer
        ),
        "live 8 layers": with_features(8),
        "live 30 layers": with_features(30),
        "decoder of 4": lambda rows: decoder_only(student, samples.batch(rows)),
        "decoder of 30": lambda rows: decoder_only(deep, samples.batch(rows)),
        "training step of 4, CE": lambda rows: trained(plain, lambda: samples.batch(rows), optimizer),
        "training step of 30, CE": lambda rows: trained(
            NextItemObjective(deep), lambda: samples.batch(rows), deep_optimizer
        ),
    }
    count = {name: sum(p.numel() for p in m.decoder.parameters()) for name, m in (("4", student), ("30", deep))}
    facts = {
        "decoder_parameters": count,
        "parameter_share": count["4"] / count["30"],
        "store_bytes": store.size_bytes,
        "store_seconds": store_seconds,
        "store_targets": store.num_targets,
    }
    return steps, facts


def built(teacher: DecoderModel, samples: Samples, spec: StoreSpec, folder: Path) -> tuple[FeatureStore, float]:
    """A store, and the seconds it took."""
    start = time.perf_counter()
    store = build_store(teacher, samples, spec, folder, "speed")
    return store, time.perf_counter() - start


RATIOS = {
    "store, 4 from 8": ("live 8 layers", "stored"),
    "store, 4 from 30": ("live 30 layers", "stored"),
    "decoder step, 4 against 30": ("decoder of 30", "decoder of 4"),
    "training step with the item head, 4 against 30": ("training step of 30, CE", "training step of 4, CE"),
    "the same, 4 distilled from the store": ("training step of 30, CE", "stored"),
}


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--runs", type=Path, default=Path("runs/speed"))
    arguments = parser.parse_args()
    data = prepared("ml-100k", None, arguments.runs)
    window = WindowConfig(max_history=50, max_events=100)
    samples = training_samples(data.sequences, window, "all", after_suffix=False)
    size = arguments.batch_size
    batches = [rows for rows in length_batches(samples.lengths, size, seed=0) if len(rows) == size]
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        steps, facts = contestants(data, samples, Path(folder))
        for turn in range(arguments.rounds + 1):
            for name, step in steps.items():
                start = time.perf_counter()
                step(batches[turn])
                if turn:  # the first turn warms up
                    seconds.setdefault(name, []).append(time.perf_counter() - start)
    ratios = {}
    for name, (slow, fast) in RATIOS.items():
        by_round = np.array(seconds[slow]) / np.array(seconds[fast])
        low, median, high = np.percentile(by_round, [10, 50, 90])
        ratios[name] = {"median": float(median), "p10": float(low), "p90": float(high)}
    result = {
        "ratios": ratios, "median_ms": {n: 1000 * float(np.median(s)) for n, s in seconds.items()}, **facts,
        "settings": {"rounds": arguments.rounds, "batch_size": size, "items": data.num_items},
    }  # fmt: skip
    record("distill_speed", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

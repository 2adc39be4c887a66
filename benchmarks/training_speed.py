"""Training steps per second: batches padded to the maximum, batches of like length, and a shared instruction.

The paper's prompt (instruction, at most 30 items, response), one target per sequence, fp32 or bfloat16 as the
processor has it. The contestants take turns step by step, on the same users, so that a noisy machine hits all alike.

    python benchmarks/training_speed.py runs/beauty --num-layers 4
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from recording import record

from slmrec.config import RecipeConfig, WindowConfig
from slmrec.dataset import load_dataset
from slmrec.models.decoder import DecoderModel, DecoderSpec, decoder_settings
from slmrec.models.prompt import prompt_embeddings
from slmrec.samples import NextItemObjective, training_samples
from slmrec.sequences import length_batches
from slmrec.train import Batch, computes_bfloat16
from slmrec.train_teacher import load_backbone

MAX_HISTORY = 30


def build(num_layers: int, num_items: int) -> DecoderModel:
    """A teacher with pretrained layers, the paper's prompt and a random item table."""
    backbone = load_backbone("smollm2-135m", num_layers)
    prefix, suffix = prompt_embeddings(backbone.folder, backbone.embeddings, "slmrec")
    model = DecoderModel(
        DecoderSpec(
            decoder=decoder_settings(backbone.decoder.config, num_layers),
            recipe=RecipeConfig(prompt="slmrec", supervision="last", titles="none"),
            num_items=num_items, item_dim=64, max_history=MAX_HISTORY, prefix_length=len(prefix),
            suffix_length=len(suffix), has_titles=False, backbone="smollm2-135m",
        )
    )  # fmt: skip
    with torch.no_grad():
        model.prefix.copy_(prefix)
        model.suffix.copy_(suffix)
    model.decoder.load_state_dict({n: v for n, v in backbone.decoder.state_dict().items() if "embed_tokens" not in n})
    return model


def pad_to_maximum(batch: Batch) -> Batch:
    """What a collator does that pads to a fixed width."""
    missing = MAX_HISTORY - batch.item_ids.shape[1]
    return batch._replace(item_ids=torch.nn.functional.pad(batch.item_ids, (missing, 0)))


def step_seconds(model: DecoderModel, batch: Batch, optimizer: torch.optim.Optimizer, *, shared: bool) -> float:
    """One whole training step: forward, backward, update."""
    model.spec = replace(model.spec, share_prefix=shared)
    start = time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=computes_bfloat16(torch.device("cpu"))):
        loss = NextItemObjective(model)(batch)["ce"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    data = load_dataset(arguments.data)
    samples = training_samples(data.sequences, WindowConfig(max_history=MAX_HISTORY), "last", after_suffix=True)
    model = build(arguments.num_layers, data.num_items).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    random_order = np.random.default_rng(0).permutation(len(samples.lengths))
    like_length = list(length_batches(samples.lengths, arguments.batch_size, seed=0))
    contestants: dict[str, list[float]] = {"padded to the maximum": [], "like length": [], "shared instruction": []}
    for turn in range(arguments.rounds + 1):
        rows = random_order[turn * arguments.batch_size : (turn + 1) * arguments.batch_size]
        seconds = {
            "padded to the maximum": step_seconds(model, pad_to_maximum(samples.batch(rows)), optimizer, shared=False),
            "like length": step_seconds(model, samples.batch(like_length[turn]), optimizer, shared=False),
            "shared instruction": step_seconds(model, samples.batch(like_length[turn]), optimizer, shared=True),
        }
        if turn:  # the first turn warms up
            for name, value in seconds.items():
                contestants[name].append(value)
    totals = {name: sum(values) for name, values in contestants.items()}
    base = totals["padded to the maximum"]
    result = {
        "users_per_second": {n: arguments.rounds * arguments.batch_size / total for n, total in totals.items()},
        "ratio_to_padded": {name: base / total for name, total in totals.items()},
        "settings": {
            "num_layers": arguments.num_layers,
            "batch_size": arguments.batch_size,
            "rounds": arguments.rounds,
        },
        "dataset": {"num_users": len(data.sequences), "num_items": data.num_items, "hash": data.hash},
    }
    record("training_speed", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

"""`python -m slmrec.cli.memory ARTIFACT DATA`: peak memory and cold start of one artefact, as JSON on stdout."""

import json
import resource
import sys
import time
from pathlib import Path

import click
import numpy as np

from slmrec.artifact import open_artifact
from slmrec.cli.loading import load_recommender
from slmrec.dataset import load_dataset
from slmrec.errors import SlmrecError
from slmrec.sequences import test_cases

BATCH_SIZE = 32
NUM_BATCHES = 4


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far.

    Linux hands ru_maxrss of the parent down through exec, so there the process's own high-water mark is read.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--device", default="auto")
def memory(artifact: Path, data: Path, device: str) -> None:
    """Load the artefact, answer one user and then batches with the longest histories, and print what it took."""
    histories = test_cases(load_dataset(data).sequences).histories
    opened = open_artifact(artifact)
    baseline_bytes = peak_rss_bytes()
    start = time.perf_counter()
    recommender = load_recommender(opened, device)
    loaded = time.perf_counter()
    k = min(10, recommender.max_top_k)
    recommender.recommend(histories.select(np.array([0])), k)
    answered = time.perf_counter()
    longest_first = np.argsort(-histories.item_ids.lengths, kind="stable")
    for rows in np.split(longest_first, range(BATCH_SIZE, len(longest_first), BATCH_SIZE))[:NUM_BATCHES]:
        recommender.recommend(histories.select(rows), k)
    measured = {
        "peak_bytes": peak_rss_bytes(),
        "baseline_bytes": baseline_bytes,
        "load_ms": (loaded - start) * 1000,
        "first_answer_ms": (answered - loaded) * 1000,
    }
    click.echo(json.dumps(measured))


if __name__ == "__main__":
    try:
        memory(standalone_mode=False)
    except SlmrecError as error:
        click.echo(f"Error: {error.problem}", err=True)
        sys.exit(2)

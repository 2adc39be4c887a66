"""What the demo starts from: the named sources, or generated input that needs no download."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from slmrec.cli.options import say

if TYPE_CHECKING:
    from slmrec.cli.demo import Demo

DATA, BACKBONE = "ml-100k", "smollm2-135m"


def real_input(run: "Demo", seed: int) -> tuple[list[Path], str]:
    """Fetch ML-100K and SmolLM2-135M, unless they are in the cache; the seed has no part in it."""
    from slmrec.sources import backbone_folder, source_files

    files = run.timed(f"source {DATA}", lambda: source_files(DATA))
    run.timed(f"source {BACKBONE}", lambda: backbone_folder(BACKBONE))
    return files, BACKBONE


def synthetic_input(run: "Demo", seed: int) -> tuple[list[Path], str]:
    """Write a log with a known answer and a tiny random decoder into the demo's folder."""
    from slmrec.synthetic import write_backbone, write_log

    folder = run.runs / "input"
    log = run.timed("log", lambda: write_log(folder / "sequences.txt", seed=seed))
    backbone = folder / "backbone"
    if not backbone.exists():
        partial = folder / "backbone.partial"
        shutil.rmtree(partial, ignore_errors=True)
        write_backbone(partial, seed=seed)
        partial.rename(backbone)
    say(f"a random decoder lies in {backbone}")
    return [log], str(backbone)

"""Nothing that is trained or chosen has seen a test item: other last items give the very same weights."""

import numpy as np
import pytest
from click.testing import CliRunner

from slmrec.artifact import open_artifact
from slmrec.cli.main import main
from slmrec.dataset import load_dataset
from slmrec.synthetic import write_backbone

NUM_ITEMS = 40
TRAIN = ["--precision", "fp32", "--epochs", "2", "--batch-size", "32", "--warmup-steps", "2"]


def write_log(path, *, other_last_items):
    """Random walks; the first user has seen everything, so that both logs number their items alike."""
    generator = np.random.default_rng(0)
    rows = [[*range(1, NUM_ITEMS + 1)]]
    rows += [((generator.integers(NUM_ITEMS) + np.arange(12)) % NUM_ITEMS + 1).tolist() for _ in range(150)]
    if other_last_items:
        rows = [[*row[:-1], (row[-1] + 17) % NUM_ITEMS + 1] for row in rows]
        rows[0][-1] = NUM_ITEMS
    path.write_text("".join(f"{user} {' '.join(map(str, row))}\n" for user, row in enumerate(rows)))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    backbone = write_backbone(tmp_path_factory.mktemp("input") / "backbone", num_layers=3)

    def make(*, other_last_items):
        runs = tmp_path_factory.mktemp("runs")
        log = write_log(runs / "log.txt", other_last_items=other_last_items)
        for command in (
            ["data", log],
            ["train-items", "--epochs", 3, "--patience", 1],
            ["train-teacher", "--backbone", backbone, "--num-layers", 3, "--prompt", "none", *TRAIN],
            ["distill", "--num-layers", 3, "--num-blocks", 2, *TRAIN],
            ["quantize", "--auto-keep"],
            ["prune", "--num-layers", 2, "-m", runs / "student", *TRAIN[:2]],
            ["sensitivity", "-m", runs / "student"],
            ["importance", "-m", runs / "student"],
        ):
            result = CliRunner().invoke(main, ["--runs", str(runs), *map(str, command)], standalone_mode=False)
            if result.exception is not None:
                raise result.exception
        return runs

    return make(other_last_items=False), make(other_last_items=True)


@pytest.mark.slow
def test_other_last_items_change_no_weight_no_scale_and_no_choice(made):
    one, other = made
    first, second = (load_dataset(runs / "data") for runs in made)
    assert first.items.item_ids == second.items.item_ids
    differ = sum(a[-1] != b[-1] for a, b in zip(first.sequences, second.sequences, strict=True))
    assert differ == 150, "the two logs do differ in their last items"
    for product in ("items", "teacher", "student", "student-int8", "student-pruned", "sensitivity", "importance"):
        files = [open_artifact(runs / product).manifest["files"] for runs in (one, other)]
        assert files[0] == files[1], product

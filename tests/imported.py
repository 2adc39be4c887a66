"""The command import-teacher on small datasets, for the tests of what it makes and of what it refuses."""

import numpy as np
from click.testing import CliRunner

from slmrec.artifact import open_artifact
from slmrec.cli.main import main
from slmrec.dataset import load_dataset
from slmrec.models.checkpoint import load_decoder


def call(runs, *arguments):
    """One command, its stdout; errors are raised, not printed."""
    result = CliRunner().invoke(main, ["--runs", str(runs), *map(str, arguments)], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def write_data(runs, ids):
    """A dataset of these external ids, met in an order that is not theirs."""
    shuffled = np.random.default_rng(3).permutation(len(ids))
    lines = [f"u{user} " + " ".join(str(ids[item]) for item in np.roll(shuffled, user)[:9]) for user in range(25)]
    runs.mkdir(exist_ok=True)
    (runs / "log.txt").write_text("\n".join(lines) + "\n")
    call(runs, "data", runs / "log.txt")
    return runs


def import_as(runs, output, folder, backbone, *flags):
    """The command, and the checkpoint it made as a model with its catalogue."""
    call(runs, "import-teacher", folder, "--backbone", backbone, "-o", output, *flags)
    artifact = open_artifact(output, "checkpoint")
    assert (artifact.stage, artifact.kind) == ("import-teacher", "checkpoint")
    return load_decoder(artifact).eval(), load_dataset(runs / "data").items

"""Whether a test fails where a line of the distillation is broken: one mutation after the other, each in a copy.

    python benchmarks/mutations.py

The copy holds the tree as it is, so what is not committed counts as well. Exit 1 where a mutation is not noticed.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from recording import record

ROOT = Path(__file__).parents[1]
TESTS = ("test_losses", "test_terms", "test_distill", "test_distill_stage")
LEFT_BEHIND = shutil.ignore_patterns(".*", "runs", "build", "__pycache__", "*.egg-info")


class Mutation(NamedTuple):
    """A line as it stands, once in its file, and as it must not be."""

    name: str
    path: str
    found: str
    broken: str


MUTATIONS = (
    Mutation("direction: 2 - cos", "compress/losses.py", "return 1 - cos", "return 2 - cos"),
    Mutation(
        "magnitude: a sum for the difference",
        "compress/losses.py",
        "student.float() - teacher",
        "student.float() + teacher",
    ),
    Mutation(
        "magnitude: the plain distance by the squared norm",
        "compress/losses.py",
        "norm if squared else norm.sqrt()",
        "norm",
    ),
    Mutation(
        "logits and list: a gradient reaches the teacher",
        "compress/losses.py",
        "teacher.detach().float()",
        "teacher.float()",
    ),
    Mutation("the state before a layer for the one after it", "compress/blocks.py", "return layer + 1", "return layer"),
    Mutation(
        "blocks end a layer too early",
        "compress/blocks.py",
        "-(-block * num_layers // num_blocks) - 1",
        "max(block * num_layers // num_blocks - 2, 0)",
    ),
    Mutation(
        "features: not the mean over blocks",
        "compress/objective.py",
        "(1 / config.num_blocks if config",
        "(1.0 if config",
    ),
    Mutation(
        "supervision: not 1 / (B - 1)",
        "compress/objective.py",
        "1 / max(1, len(self.adapters))",
        "1 / config.num_blocks",
    ),
    Mutation(
        "supervision: weight left out",
        "compress/objective.py",
        "= config.supervision_weight * share * cross",
        "= share * cross",
    ),
    Mutation(
        "features of the first token are compared",
        "compress/objective.py",
        "return ~first[wanted]",
        "return first[wanted] | True",
    ),
    Mutation(
        "online: the teacher is never left alone",
        "compress/objective.py",
        "features if self.online.teacher_gradient else features.detach()",
        "features",
    ),
    Mutation(
        "online: the teacher is never moved",
        "compress/objective.py",
        "features if self.online.teacher_gradient else features.detach()",
        "features.detach()",
    ),
    Mutation(
        "online: the student's scores for the teacher's",
        "compress/objective.py",
        "cross_entropy(teacher_heads[-1], targets_of(batch))",
        "cross_entropy(heads[-1], targets_of(batch))",
    ),
    Mutation(
        "online: the student's adapters for the teacher's",
        "compress/objective.py",
        "weight * cross_entropy(teacher_logits, targets)",
        "weight * cross_entropy(student_logits, targets)",
    ),
    Mutation(
        "online: the teacher's supervision is never a mean over blocks",
        "compress/objective.py",
        "(1 / len(self.teacher_adapters) if",
        "(1.0 if",
    ),
    Mutation(
        "list: scores of the items after the named ones",
        "compress/objective.py",
        "batch.best.long() - 1",
        "batch.best.long() % self.student.num_items",
    ),
    Mutation(
        "magnitude: never relative to the teacher's norm",
        "compress/objective.py",
        'norms[block] if config.magnitude_scale == "hidden" else None',
        "None",
    ),
    Mutation(
        "features: a teacher that is asked is moved",
        "compress/features.py",
        "@torch.no_grad()\ndef teacher_says",
        "def teacher_says",
    ),
    Mutation(
        "store: rows of another sample",
        "compress/features.py",
        "[row + 1]) for row in samples",
        "[row + 1]) for row in samples[::-1]",
    ),
    Mutation(
        "store: found again under another teacher",
        "compress/features.py",
        '{"teacher": teacher_hash, "samples"',
        '{"samples"',
    ),
    Mutation(
        "start: first layers for evenly spaced ones",
        "compress/student.py",
        "first else kept_layers(teacher.num_layers, config.num_layers)",
        "first else list(range(config.num_layers))",
    ),
)


UNBROKEN = Mutation("nothing", "compress/losses.py", "return 1 - cos", "return 1 - cos")


def outcome(mutation: Mutation) -> dict[str, Any]:
    """The test that fails first, in a copy of the tree with the line broken."""
    with tempfile.TemporaryDirectory() as place:
        tree = Path(place) / "tree"
        shutil.copytree(ROOT, tree, ignore=LEFT_BEHIND, symlinks=True)
        path = tree / mutation.path
        text = path.read_text(encoding="utf-8")
        if (times := text.count(mutation.found)) != 1:
            raise SystemExit(f"{mutation.path} has {mutation.found!r} {times} times, expected once")
        path.write_text(text.replace(mutation.found, mutation.broken), encoding="utf-8")
        files = [f"tests/{name}.py" for name in TESTS]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *files]
        environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        ran = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    failed = re.search(r"^FAILED tests/(\S+)", ran.stdout, flags=re.MULTILINE)
    if ran.returncode not in (0, 1) or (ran.returncode == 1) != bool(failed):
        said = (ran.stdout + ran.stderr)[-2000:]
        raise SystemExit(f"{mutation.name}: pytest ended with {ran.returncode}\n{said}")
    return {"mutation": mutation.name, "file": mutation.path, "failed": failed[1] if failed else None}


def main() -> int:
    """Break, test, record."""
    if failed := outcome(UNBROKEN)["failed"]:
        raise SystemExit(f"{failed} fails with no line broken")
    outcomes = []
    for mutation in MUTATIONS:
        outcomes.append(outcome(mutation))
        print(json.dumps(outcomes[-1]), flush=True)
    record("mutations", {"tests": list(TESTS), "mutations": outcomes})
    return int(any(one["failed"] is None for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())

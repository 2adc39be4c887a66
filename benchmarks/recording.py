"""Where every measured figure goes: `benchmarks/results/NAME.json`, with machine, versions, commit and command."""

import json
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slmrec.machine import describe_machine

RESULTS = Path(__file__).parent / "results"


def _without_place(arguments: list[str]) -> list[str]:
    """The arguments, but for the folder of one machine that intermediate results were kept in.

    >>> _without_place(["--rounds", "8", "--runs", "somewhere"])
    ['--rounds', '8']
    """
    if "--runs" not in arguments:
        return arguments
    place = arguments.index("--runs")
    return [*arguments[:place], *arguments[place + 2 :]]


def commit() -> str:
    """The commit that is measured."""
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=RESULTS.parent).stdout.strip()


def record(name: str, result: dict[str, Any]) -> Path:
    """Write a result with all it takes to repeat it."""
    entry = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *_without_place(sys.argv[1:])]),
        "machine": describe_machine(),
        "result": result,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")
    return path

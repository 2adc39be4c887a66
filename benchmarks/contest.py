"""Contestants that answer the same requests in turn, each in a process (and, if need be, an environment) of its own.

Threads of one never spin while another is timed: a round asks one contestant for half a second, after a pause and a
first call that is not counted. A contestant is a script that calls `answer(function)`; this file needs numpy alone.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MARK = "answer: "
PAUSE = 0.25
"""Seconds after which no thread pool in use here spins any more."""
TURN = 0.5
"""Seconds that a contestant is asked at a time: processors are slow for some milliseconds after a pause."""


class Contestant:
    """A running script."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.about = self._read()

    def seconds(self, requests: Path) -> list[float]:
        """Seconds of each call, for `TURN` seconds, on a file of requests (`item_ids`, one call a row of it)."""
        time.sleep(PAUSE)
        return self._ask(requests, TURN)["seconds"]  # type: ignore[no-any-return]

    def lists(self, requests: Path) -> np.ndarray:
        """The first ten items of each user of the first call, [users, 10]."""
        return np.array(self._ask(requests, 0)["first_ten"])

    def close(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _ask(self, requests: Path, seconds: float) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"requests": str(requests), "seconds": seconds}) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # libraries print too
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))  # type: ignore[no-any-return]
        raise SystemExit(f"{' '.join(map(str, self.process.args))} ended with {self.process.wait()}")


def answer(function: Callable[[np.ndarray], np.ndarray], about: Mapping[str, Any] | None = None) -> None:
    """Answer until the input ends; `function` takes item ids [batch, history], oldest first, gives the best items."""
    print(f"\n{MARK}{json.dumps(dict(about or {}))}", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        with np.load(order["requests"]) as stored:
            batches = list(stored["item_ids"])
            if "lengths" in stored:
                batches = [batch[:, -length:] for batch, length in zip(batches, stored["lengths"], strict=True)]
        items, seconds = function(batches[0]), []
        while sum(seconds) < order["seconds"]:
            start = time.perf_counter()
            function(batches[len(seconds) % len(batches)])
            seconds.append(time.perf_counter() - start)
        print(f"\n{MARK}{json.dumps({'seconds': seconds, 'first_ten': items[:, :10].tolist()})}", flush=True)


def contest(
    contestants: Mapping[str, Contestant], requests: Mapping[str, Path], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Request set -> contestant -> the median seconds of a call in every round."""
    found: dict[str, dict[str, list[float]]] = {size: {name: [] for name in contestants} for size in requests}
    for turn in range(rounds):
        for size, path in requests.items():
            for name, contestant in contestants.items():
                found[size][name].append(float(np.median(contestant.seconds(path))))
        print(f"round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    return found


def ratios(medians: Mapping[str, Sequence[float]], baseline: str) -> dict[str, dict[str, float]]:
    """How many times as fast as the baseline each contestant was, round by round."""
    slow = np.array(medians[baseline])
    found = {}
    for name, own in medians.items():
        low, middle, high = np.percentile(slow / np.array(own), [10, 50, 90]).tolist()
        found[name] = {"ratio": middle, "p10": low, "p90": high, "median_ms": 1000 * float(np.median(own))}
    return found

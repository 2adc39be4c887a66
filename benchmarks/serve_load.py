"""What HTTP costs: `slmcompress serve` under load, against the same runtime called in one process.

    python benchmarks/serve_load.py BUNDLE [-- FLAGS OF slmcompress serve]

One user a request, real histories (the bundle's golden requests), client and server on one machine. In turns, round by
round: the runtime alone at batch 1 and at the batch that the server made, and the server with as many users as keep
it busy. Then, with Poisson arrivals: the 99th percentile at 40 and 60 % of that, against a queue without any cost but
the runtime's own measured times, fed with the same arrivals; the answers of a server asked for two and a half times as
much as it can, and whether it recovers; its memory over some minutes. `--quick` shows that it runs and records nothing.
"""

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from recording import record

from export.golden import stored_golden
from export.runtime import OnnxRecommender
from slmrec.catalogue import load_catalogue
from slmrec.recommender import Histories

K, MAX_BATCH, MAX_QUEUE = 10, 64, 256
CLIENT = Path(__file__).parent / "load_client.py"
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
T_QUANTILE = 2.101
"""Of Student's t at 0.975, 18 degrees of freedom."""


@dataclass(frozen=True)
class Lengths:
    """How long each part takes."""

    rounds: int = 8
    seconds: float = 5.0
    open_seconds: float = 60.0
    overload_seconds: float = 10.0
    memory_seconds: float = 300.0
    service_runs: int = 60
    users: int = 32


QUICK = Lengths(rounds=2, seconds=0.5, open_seconds=1.5, overload_seconds=1.0, memory_seconds=2.0, service_runs=3)


class Served:
    """The server in a process of its own, and clients of it in theirs."""

    def __init__(self, bundle: Path, more_flags: list[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        flags = ["--port", str(self.port), "--max-batch", str(MAX_BATCH), "--max-queue", str(MAX_QUEUE), *more_flags]
        command = [sys.executable, "-m", "slmrec.cli.main", "serve", str(bundle), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.seen = psutil.Process(self.process.pid)
        histories, _ = stored_golden(bundle)
        ids = load_catalogue(bundle).item_ids
        self.bodies = [json.dumps({"history": [ids[item - 1] for item in row], "k": K}) for row in histories.item_ids]
        self.first = 0

    def wait(self) -> None:
        """Until it is ready."""
        for _ in range(600):
            with contextlib.suppress(OSError):
                self.get("/v2/health/ready")
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise RuntimeError("the server did not start")

    def get(self, path: str) -> str:
        """What it answers."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}") as answer:
            return answer.read().decode()  # type: ignore[no-any-return]

    def batches(self) -> tuple[float, float]:
        """Batches and users so far."""
        lines = dict(line.rsplit(" ", 1) for line in self.get("/metrics").splitlines() if not line.startswith("#"))
        return tuple(float(lines[f"slmcompress_batch_users_{what}"]) for what in ("count", "sum"))  # type: ignore[return-value]

    def begin(self, seconds: float, **plan: Any) -> "subprocess.Popen[str]":
        """A client that asks for so long."""
        self.first += 17
        whole = {"port": self.port, "bodies": self.bodies, "first": self.first, "seconds": seconds, **plan}
        client = subprocess.Popen(
            [sys.executable, str(CLIENT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert client.stdin is not None
        client.stdin.write(json.dumps(whole))
        client.stdin.close()
        client.stdin = None
        return client

    def ask(self, seconds: float, **plan: Any) -> dict[str, Any]:
        """What such a client saw, with the processor's seconds that the server took meanwhile."""
        before = self.seen.cpu_times()
        client = self.begin(seconds, **plan)
        text, _ = client.communicate()
        if client.returncode:
            raise RuntimeError("the client failed")
        after = self.seen.cpu_times()
        found: dict[str, Any] = json.loads(text)
        found["server_cpu_seconds"] = after.user + after.system - before.user - before.system
        return found | {name: np.array(found[name]) for name in ("sent", "took", "status")}

    def stop(self) -> None:
        """SIGTERM, and its end."""
        self.process.terminate()
        assert self.process.wait(60) == 0


@contextlib.contextmanager
def serving(bundle: Path, flags: list[str]) -> Iterator[Served]:
    """A server that is stopped in the end."""
    served = Served(bundle, flags)
    try:
        served.wait()
        yield served
    except BaseException:
        served.process.kill()
        raise
    served.stop()


def alone(runtime: OnnxRecommender, histories: Histories, size: int, seconds: float, seed: int) -> float:
    """Users a second of the runtime by itself."""
    generator, users, start = np.random.default_rng([seed, size]), 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        runtime.recommend(histories.select(generator.integers(len(histories), size=size)), K)
        users += size
    return users / (time.perf_counter() - start)


def saturation(served: Served, runtime: OnnxRecommender, histories: Histories, lengths: Lengths) -> dict[str, Any]:
    """Throughput at saturation as a ratio to the runtime alone, in turns."""
    served.ask(lengths.seconds / 2, users=lengths.users)
    rows = []
    for number in range(lengths.rounds):
        single = alone(runtime, histories, 1, lengths.seconds, number)
        before = served.batches()
        found = served.ask(lengths.seconds, users=lengths.users)
        count, users = np.subtract(served.batches(), before)
        size = round(users / count)
        many, span = (
            alone(runtime, histories, size, lengths.seconds, number),
            float((found["sent"] + found["took"]).max()),
        )
        rows.append({
            "per_second": len(found["sent"]) / span, "batch": users / count, "runtime_batch_1": single,
            "runtime_batch": many, "client_cores": found["cpu_seconds"] / span,
            "server_cores": found["server_cpu_seconds"] / span, "ok": bool((found["status"] == 200).all()),
        })  # fmt: skip
    values = {name: float(np.median([row[name] for row in rows])) for name in rows[0] if name != "ok"}
    ratios = {
        f"ratio_to_{name}": spread(np.array([row["per_second"] / row[name] for row in rows]))
        for name in ("runtime_batch_1", "runtime_batch")
    }
    return {**values, **ratios, "all_answered": all(row["ok"] for row in rows), "rounds": rows}


def service_times(runtime: OnnxRecommender, histories: Histories, runs: int) -> dict[int, np.ndarray]:
    """Seconds of batches of each size, in turns; large ones less often."""
    generator = np.random.default_rng(0)
    found: dict[int, list[float]] = {size: [] for size in SIZES}
    for run in range(runs):
        for size in SIZES:
            if run % max(1, size // 8) == 0:
                users = histories.select(generator.integers(len(histories), size=size))
                start = time.perf_counter()
                runtime.recommend(users, K)
                found[size].append(time.perf_counter() - start)
    return {size: np.array(seconds) for size, seconds in found.items()}


def ideal_queue(arrivals: np.ndarray, service: dict[int, np.ndarray], seed: int) -> np.ndarray:
    """Seconds from arrival to answer if nothing took time but the runtime: what waits is the next batch.

    Args:
        arrivals: ascending, seconds.
        service: size of a batch -> seconds that such batches took; a size between two counts as the larger.
        seed: which of them a batch takes.
    """
    generator, took, first, now = np.random.default_rng(seed), np.empty(len(arrivals)), 0, 0.0
    sizes = np.array(sorted(service))
    while first < len(arrivals):
        now = max(now, float(arrivals[first]))
        count = min(int(np.searchsorted(arrivals, now, side="right")) - first, int(sizes[-1]))
        now += float(generator.choice(service[int(sizes[np.searchsorted(sizes, count)])]))
        took[first : first + count] = now - arrivals[first : first + count]
        first += count
    return took


def at_rate(served: Served, rate: float, seconds: float, service: dict[int, np.ndarray]) -> dict[str, Any]:
    """The 99th percentile with Poisson arrivals against the ideal queue's."""
    found = served.ask(seconds, rate=rate, connections=MAX_QUEUE, seed=int(rate))
    ideal = np.median([np.percentile(ideal_queue(found["sent"], service, seed), 99) for seed in range(20)])
    p50, p99 = (1000 * float(np.percentile(found["took"], percent)) for percent in (50, 99))
    return {
        "rate": rate, "requests": len(found["sent"]), "p50_ms": p50, "p99_ms": p99, "ideal_p99_ms": 1000 * float(ideal),
        "p99_ratio": p99 / (1000 * float(ideal)), "client_late_p99_ms": found["late_p99_ms"],
        "client_cores": found["cpu_seconds"] / seconds, "all_answered": bool((found["status"] == 200).all()),
    }  # fmt: skip


def overload(served: Served, rate: float, seconds: float) -> dict[str, Any]:
    """Asked for more than it can: how soon it says so."""
    found = served.ask(seconds, rate=rate, connections=4 * MAX_QUEUE, seed=1)
    refused = found["took"][found["status"] == 429]
    return {
        "rate": rate, "requests": len(found["sent"]), "answered": int((found["status"] == 200).sum()),
        "refused": len(refused), "unanswered": found["unanswered"],
        "other": int((~np.isin(found["status"], (200, 429))).sum()), "client_late_p99_ms": found["late_p99_ms"],
        "refused_p99_ms": 1000 * float(np.percentile(refused, 99)) if len(refused) else None,
    }  # fmt: skip


def memory(served: Served, rate: float, seconds: float) -> dict[str, Any]:
    """Resident memory under load: how it grows."""
    client, start = served.begin(seconds, rate=rate, connections=MAX_QUEUE, seed=2), time.perf_counter()
    times, sizes = [], []
    while (now := time.perf_counter() - start) < seconds:
        times.append(now)
        sizes.append(served.seen.memory_info().rss / 1e6)
        time.sleep(seconds / 200)
    client.communicate()
    if client.returncode:
        raise RuntimeError("the client failed")
    return {"seconds": seconds, "rate": rate, "rss_mb": sizes[-1], **slope(np.array(times), np.array(sizes))}


def slope(seconds: np.ndarray, megabytes: np.ndarray) -> dict[str, Any]:
    """MB an hour by least squares over the means of 20 equal parts, so that neighbours' likeness does not count.

    >>> slope(np.arange(100.0), np.arange(100.0) / 3600)["mb_per_hour"]
    1.0
    """
    parts = np.array_split(np.arange(len(seconds)), 20)
    x, y = (np.array([values[part].mean() for part in parts]) for values in (seconds, megabytes))
    x = x - x.mean()
    estimate = float(x @ y / (x @ x))
    rest = y - y.mean() - estimate * x
    error = float(np.sqrt(rest @ rest / 18 / (x @ x)))
    low, high = (3600 * (estimate + sign * T_QUANTILE * error) for sign in (-1, 1))
    return {"mb_per_hour": round(3600 * estimate, 6), "interval_95": [low, high]}


def spread(values: np.ndarray) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    p10, median, p90 = np.percentile(values, [10, 50, 90]).tolist()
    return {"median": median, "p10": p10, "p90": p90}


def measure(bundle: Path, lengths: Lengths, flags: list[str]) -> dict[str, Any]:
    """All parts."""
    runtime, (histories, _) = OnnxRecommender(bundle), stored_golden(bundle)
    with serving(bundle, flags) as served:
        result: dict[str, Any] = {"saturation": saturation(served, runtime, histories, lengths)}
        print(json.dumps(result["saturation"] | {"rounds": None}), flush=True, file=sys.stderr)
        most = result["saturation"]["per_second"]
        for share in (0.4, 0.6):
            service = service_times(runtime, histories, lengths.service_runs)
            result[f"load_{share}"] = at_rate(served, share * most, lengths.open_seconds, service)
        result["overload"] = overload(served, 2.5 * most, lengths.overload_seconds)
        after = at_rate(served, 0.4 * most, lengths.seconds, service)
        result["overload"]["afterwards"] = {name: after[name] for name in ("p99_ms", "p99_ratio", "all_answered")}
        result["memory"] = memory(served, 0.6 * most, lengths.memory_seconds)
    return result


def main() -> None:
    """Run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--memory-seconds", type=float, default=Lengths.memory_seconds)
    parser.add_argument("flags", nargs="*", help="of slmcompress serve, after --")
    arguments = parser.parse_args()
    lengths = QUICK if arguments.quick else Lengths(memory_seconds=arguments.memory_seconds)
    result = measure(arguments.bundle, lengths, arguments.flags)
    print(json.dumps(result, indent=2))
    if not arguments.quick:
        record("serve_load", result)


if __name__ == "__main__":
    main()

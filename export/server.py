"""A bundle over HTTP: what is served, swapped and counted. No PyTorch.

Users are computed together as they wait; a full queue answers 429 at once. A new bundle is verified and loaded beside
the old one before it takes over, and the old one answers what it has accepted. No client names a path or a state, and
no log line holds a history.
"""

import asyncio
import json
import logging
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from socket import AF_INET, AF_INET6, create_server, socket
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from export.batching import Batcher, QueueFullError, step_back
from export.inference_protocol import Limits
from export.runtime import OnnxRecommender
from export.states import AppendingRecommender, StateStore
from export.verify import verify
from slmrec.artifact import read_manifest
from slmrec.catalogue import Catalogue, load_catalogue
from slmrec.errors import ConfigError, DataError, SlmrecError
from slmrec.ragged import Ragged
from slmrec.recommender import Histories, TopK
from slmrec.serve_config import ServeConfig

FULL_QUEUE = "the queue is full; try again later"
SIZES = (1, 2, 4, 8, 16, 32, 64)
KEEP_ALIVE_S = 75
"""An idle connection is kept longer than load balancers keep theirs (60 s as a rule), so that none of them sends a
request into one that is just being closed."""
LINGER_S = 0.5
"""After the last connection was taken: so long may a request still arrive over those there are."""
LOG = logging.getLogger("slmcompress.serve")


class RefusedError(Exception):
    """A request that gets another answer than its own: a status and one line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, eq=False)
class Served:
    """One verified bundle, loaded."""

    hash: str
    graph: OnnxRecommender
    items: Catalogue
    batcher: Batcher
    limits: Limits

    @property
    def top_k(self) -> int:
        """Length of a list."""
        return int(self.graph.signature["top_k"])


class _States(Collector):
    """What the store of user states counts itself."""

    def __init__(self, store: StateStore) -> None:
        self.store = store

    def collect(self) -> Iterator[Metric]:
        """Counts as they are now."""
        yield CounterMetricFamily("slmcompress_state_hits", "Users answered from a state.", self.store.hits)
        yield CounterMetricFamily("slmcompress_state_misses", "Users who had none.", self.store.misses)
        yield GaugeMetricFamily("slmcompress_state_bytes", "Memory of user states.", self.store.size_bytes)


class Metrics:
    """What Prometheus reads."""

    def __init__(self, store: StateStore) -> None:
        own = self.registry = CollectorRegistry()
        self.requests = Counter("slmcompress_requests", "Answers.", ["path", "status"], registry=own)
        self.seconds = Histogram("slmcompress_request_seconds", "Time to answer, with waiting.", ["path"], registry=own)
        self.batches = Histogram("slmcompress_batch_users", "Users computed together.", buckets=SIZES, registry=own)
        self.waiting = Gauge("slmcompress_waiting_users", "Users in the queue.", registry=own)
        self.dropped = Counter("slmcompress_dropped_ids", "Unknown ids by where they stood.", ["field"], registry=own)
        self.swaps = Counter("slmcompress_swaps", "New bundles by outcome.", ["outcome"], registry=own)
        own.register(_States(store))


@dataclass(eq=False)
class Server:
    """What the application's parts share; used in one event loop."""

    path: Path
    config: ServeConfig
    key: Path | None = None
    token: bytes | None = None
    now: Served | None = None
    _swapping: asyncio.Lock = field(default_factory=asyncio.Lock)
    _refused: object = None
    """Files of the bundle that was refused last."""

    def __post_init__(self) -> None:
        self.states = StateStore(int(self.config.state_mb * 1e6))  # of all bundles: keys tell them apart
        self.metrics = Metrics(self.states)

    def load(self) -> Served:
        """Verify and load the bundle at the path, on the CPU; slow, so that a running server asks for it in a thread.

        Raises:
            SlmrecError: it is no bundle, does not verify, or has no graph for the user states that are asked for.
        """
        with ThreadPoolExecutor(1, initializer=step_back) as thread:  # ONNX Runtime's threads are started by this one
            return thread.submit(self._load).result()

    def _load(self) -> Served:
        folder = self.path.resolve()
        verify(folder, key=self.key)
        threads = self.config.threads or None
        keeping = AppendingRecommender(folder, self.states, threads=threads) if self.config.state_mb else None
        graph = keeping.full if keeping is not None else OnnxRecommender(folder, threads=threads)
        batcher = Batcher(
            keeping or graph, max_batch=self.config.max_batch, max_queue=self.config.max_queue,
            seen=self.metrics.batches.observe,
        )  # fmt: skip
        limits = Limits(graph.num_items, self.config.max_queue, self.config.max_ids)
        served = Served(str(read_manifest(folder)["hash"]), graph, load_catalogue(folder), batcher, limits)
        _warm(served)
        return served

    async def swap(self, *, again: bool = True) -> bool:
        """Take over another bundle at the path, if there is one and it verifies; else the old one goes on.

        Args:
            again: look once more at files that were refused and have not changed since, and say so where the bundle is
                the one that is served.
        """
        async with self._swapping:
            old, files = self.now, None
            try:
                files = await asyncio.to_thread(_files, self.path.resolve())
                if not again and files == self._refused:
                    return False
                found = str((await asyncio.to_thread(read_manifest, self.path.resolve()))["hash"])
                if old is not None and found == old.hash:
                    if again:
                        log("no other bundle", bundle=found)
                    return False
                new = await asyncio.to_thread(self.load)
            except (SlmrecError, OSError) as error:
                self._refused = files
                self.metrics.swaps.labels("refused").inc()
                log("swap refused", reason=str(error).splitlines()[0])
                return False
            self.now, self._refused = new, None
            self.metrics.swaps.labels("taken").inc()
            log("swap", bundle=new.hash, before=old.hash if old is not None else None)
            if old is not None:
                await old.batcher.drain()
            return True

    async def watch(self) -> None:
        """Look for another bundle again and again."""
        while True:
            await asyncio.sleep(self.config.watch_s)
            await self.swap(again=False)

    async def ask(self, served: Served, histories: Histories, k: int, allowed: Ragged | None = None) -> TopK:
        """A list for each user.

        Raises:
            RefusedError: 400 where there can be no answer, 429 where the queue is full, 504 where it took too long,
                500 where the graph gave none.
        """
        try:  # before others share a batch with it
            histories.check(served.graph.num_items, newcomers=served.graph.num_interactions is not None)
            return await served.batcher.recommend(histories, k, self.config.timeout_s, allowed)
        except QueueFullError:
            raise RefusedError(429, FULL_QUEUE) from None
        except TimeoutError:
            raise RefusedError(504, f"no answer within {self.config.timeout_s:g} s") from None
        except (DataError, ConfigError) as error:
            raise RefusedError(400, error.problem) from None
        except SlmrecError as error:
            raise RefusedError(500, error.problem) from None


class _Web(uvicorn.Server):
    """Takes no new connection at the end, yet answers what is on its way over those there are."""

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        for listener in self.servers:
            listener.close()
        await asyncio.sleep(LINGER_S)
        await super().shutdown(sockets)


def listen(config: ServeConfig) -> socket:
    """The socket that the server will answer on.

    Raises:
        ConfigError: the address is taken, or is none of this machine's.
    """
    try:
        family = AF_INET6 if ":" in config.host else AF_INET
        return create_server((config.host, config.port), family=family)
    except OSError as error:
        raise ConfigError(
            f"{config.host}:{config.port} cannot be served on: {error.strerror}",
            remedy="another --port (0 chooses a free one), or another --host",
        ) from None


async def run(server: Server, listener: socket) -> None:
    """Serve until SIGTERM or Ctrl-C; then what was accepted is answered. SIGHUP looks for another bundle."""
    from export.routes import create_app

    config, swaps = server.config, set[asyncio.Task[bool]]()

    def swap() -> None:
        task = asyncio.get_running_loop().create_task(server.swap())
        swaps.add(task)
        task.add_done_callback(swaps.discard)

    web = _Web(
        uvicorn.Config(
            create_app(server), log_level="warning", access_log=False, timeout_keep_alive=KEEP_ALIVE_S, lifespan="off",
            timeout_graceful_shutdown=max(1, round(2 * config.timeout_s)),
        )
    )  # fmt: skip
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, swap)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when it is done, which is then the end
    watching = asyncio.create_task(server.watch()) if config.watch_s else None
    await web.serve([listener])
    if watching is not None:
        watching.cancel()
    if server.now is not None:
        await server.now.batcher.drain()


def log(event: str, **fields: Any) -> None:
    """A line of JSON."""
    LOG.info(json.dumps({"event": event, "time": round(time.time(), 3), **fields}))


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a bundle's files: the same while nobody writes there."""
    found = [(str(path), path.stat()) for path in sorted(folder.rglob("*"))]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


def _warm(served: Served) -> None:
    """What would be made with the first request: the map of ids, popularity, ONNX Runtime's memory."""
    served.graph.recommend(Histories.of(Ragged.from_rows([[1]])), 1)
    _ = served.items.internal_ids, served.graph.num_interactions

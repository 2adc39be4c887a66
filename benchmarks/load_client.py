"""A client of `serve_load.py` in a process of its own: it asks over connections kept alive and says what it saw.

    python benchmarks/load_client.py < PLAN

The plan is JSON: port, bodies, seconds and either `users` (a closed loop: each asks again when answered) or `rate` (an
open one: Poisson arrivals, whatever was answered). It prints JSON: when each request was sent, how long it took, its
status, the processor's seconds of the client, and how late it sent at the 99th percentile.
"""

import asyncio
import json
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import uvloop

DRAIN_S = 10.0


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, done: Callable[["Connection", int], None]) -> None:
        self.done, self.buffer = done, b""
        self.sent = 0.0

    def connection_made(self, transport: Any) -> None:
        """It stands."""
        self.transport = transport

    def send(self, request: bytes) -> None:
        """A request, all at once."""
        self.sent = time.perf_counter()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Part of an answer, or all of it."""
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self.buffer[:end].lower()
        length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(self.buffer) >= end + 4 + length:
            status, self.buffer = int(head[9:12]), self.buffer[end + 4 + length :]
            self.done(self, status)


class Client:
    """Sends and writes down."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan, self.start = plan, 0.0
        bodies = [body.encode() for body in plan["bodies"]]
        head = "POST /recommend HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n"
        self.requests = [head.format(len(body)).encode() + body for body in bodies]
        self.next, self.pending = int(plan["first"]), 0
        self.seen: list[tuple[float, float, int]] = []
        self.free: deque[Connection] = deque()

    async def connect(self) -> Connection:
        """One connection more."""
        _, one = await asyncio.get_running_loop().create_connection(
            lambda: Connection(self.answered), "127.0.0.1", self.plan["port"]
        )
        return one

    def send(self, one: Connection) -> None:
        """The next request."""
        self.pending += 1
        self.next += 1
        one.send(self.requests[self.next % len(self.requests)])

    def answered(self, one: Connection, status: int) -> None:
        """Write an answer down."""
        now = time.perf_counter()
        self.pending -= 1
        self.seen.append((one.sent - self.start, now - one.sent, status))
        if "users" in self.plan and now - self.start < self.plan["seconds"]:
            self.send(one)
        else:
            self.free.append(one)

    async def closed(self) -> None:
        """Every user asks again when he is answered."""
        connections = [await self.connect() for _ in range(self.plan["users"])]
        self.start = time.perf_counter()
        for one in connections:
            self.send(one)
        await self.rest(self.plan["seconds"])

    async def open(self) -> list[float]:
        """Requests arrive by chance whatever was answered; gives how late each was sent."""
        rate, seconds = self.plan["rate"], self.plan["seconds"]
        generator = np.random.default_rng(self.plan["seed"])
        arrivals = np.cumsum(generator.exponential(1 / rate, int(rate * seconds * 1.5) + 10))
        self.free = deque([await self.connect() for _ in range(self.plan["connections"])])
        self.start, late = time.perf_counter(), []
        for arrival in arrivals[arrivals < seconds].tolist():
            wait = self.start + arrival - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            while not self.free:
                await asyncio.sleep(0.001)
            self.send(self.free.popleft())  # in turns, so that none is idle until the server closes it
            late.append(time.perf_counter() - self.start - arrival)
        await self.rest(0)
        return late

    async def rest(self, seconds: float) -> None:
        """Until everything sent is answered."""
        await asyncio.sleep(seconds)
        deadline = time.perf_counter() + DRAIN_S
        while self.pending and time.perf_counter() < deadline:
            await asyncio.sleep(0.01)


async def main() -> None:
    """Carry out the plan."""
    client = Client(json.load(sys.stdin))
    before = time.process_time()
    late = await client.open() if "rate" in client.plan else await client.closed() or [0.0]
    sent, took, status = zip(*sorted(client.seen), strict=True)
    print(json.dumps({
        "sent": sent, "took": took, "status": status, "unanswered": client.pending,
        "cpu_seconds": time.process_time() - before, "late_p99_ms": 1000 * float(np.percentile(late, 99)),
    }))  # fmt: skip


if __name__ == "__main__":
    uvloop.run(main())

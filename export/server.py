"""A bundle over HTTP: the Open Inference Protocol v2, and plain JSON by external ids. No PyTorch.

Users are computed together as they wait; a full queue answers 429 at once. A new bundle is verified and loaded beside
the old one before it takes over, and the old one answers what it has accepted. No client names a path or a state, and
no log line holds a history.
"""

import asyncio
import hmac
import json
import logging
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from socket import socket
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from export.batching import Batcher, QueueFullError
from export.inference_protocol import INPUTS, OUTPUTS, InferRequest, Limits, ProtocolError, infer_response, parse_infer
from export.runtime import OnnxRecommender
from export.verify import verify
from slmrec.artifact import read_manifest
from slmrec.catalogue import Catalogue, load_catalogue
from slmrec.errors import SlmrecError
from slmrec.ragged import Ragged
from slmrec.recommender import PAD, Histories, TopK
from slmrec.serve_config import ServeConfig

MODEL = "recommend"
SIZES = (1, 2, 4, 8, 16, 32, 64)
HEADER_LENGTH = "inference-header-content-length"
BUNDLE_HEADER = "x-bundle-hash"
LINGER_S = 0.5
"""After the last connection was taken: so long may a request still arrive over those there are."""
OPEN_PATHS = ("/v2/health/live", "/v2/health/ready")
LOG = logging.getLogger("slmcompress.serve")


class RefusedError(Exception):
    """A request that gets another answer than its own: a status and one line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, eq=False)
class Served:
    """One verified bundle, loaded."""

    path: Path
    hash: str
    recommender: OnnxRecommender
    items: Catalogue
    batcher: Batcher

    @property
    def limits(self) -> tuple[int, int]:
        """Items, and the length of a list."""
        return self.recommender.num_items, int(self.recommender.signature["top_k"])


class Metrics:
    """What Prometheus reads."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        self.requests = Counter("slmcompress_requests", "Answers.", ["path", "status"], registry=own)
        self.seconds = Histogram("slmcompress_request_seconds", "Time to answer, with waiting.", ["path"], registry=own)
        self.batches = Histogram("slmcompress_batch_users", "Users computed together.", buckets=SIZES, registry=own)
        self.waiting = Gauge("slmcompress_waiting_users", "Users in the queue.", registry=own)
        self.dropped = Counter("slmcompress_dropped_ids", "Unknown ids of histories.", registry=own)
        self.swaps = Counter("slmcompress_swaps", "New bundles by outcome.", ["outcome"], registry=own)


@dataclass(eq=False)
class Server:
    """What the application's parts share; used in one event loop."""

    path: Path
    config: ServeConfig
    key: Path | None = None
    token: bytes | None = None
    metrics: Metrics = field(default_factory=Metrics)
    now: Served | None = None
    _swapping: asyncio.Lock = field(default_factory=asyncio.Lock)

    def load(self) -> Served:
        """Verify and load the bundle at the path, on the CPU; slow, so it runs in a thread.

        Raises:
            SlmrecError: it is no bundle, or does not verify.
        """
        folder = self.path.resolve()
        verify(folder, key=self.key)
        recommender = OnnxRecommender(folder)
        batcher = Batcher(
            recommender, max_batch=self.config.max_batch, max_queue=self.config.max_queue,
            seen=self.metrics.batches.observe,
        )  # fmt: skip
        return Served(folder, str(read_manifest(folder)["hash"]), recommender, load_catalogue(folder), batcher)

    async def swap(self) -> bool:
        """Take over another bundle at the path, if there is one and it verifies; else the old one goes on."""
        async with self._swapping:
            old = self.now
            try:
                found = str((await asyncio.to_thread(read_manifest, self.path.resolve()))["hash"])
                if old is not None and found == old.hash:
                    return False
                new = await asyncio.to_thread(self.load)
            except (SlmrecError, OSError) as error:
                self.metrics.swaps.labels("refused").inc()
                _log("swap refused", reason=str(error).splitlines()[0])
                return False
            self.now = new
            self.metrics.swaps.labels("taken").inc()
            _log("swap", bundle=new.hash, before=old.hash if old is not None else None)
            if old is not None:
                await old.batcher.drain()
            return True

    async def watch(self) -> None:
        """Look for another bundle again and again."""
        while True:
            await asyncio.sleep(self.config.watch_s)
            await self.swap()

    async def ask(self, served: Served, histories: Histories, k: int) -> TopK:
        """A list for each user.

        Raises:
            RefusedError: 429 where the queue is full, 504 where it took too long, 400 where there can be no answer.
        """
        try:
            return await served.batcher.recommend(histories, k, self.config.timeout_s)
        except QueueFullError:
            raise RefusedError(429, "the queue is full; try again later") from None
        except TimeoutError:
            raise RefusedError(504, f"no answer within {self.config.timeout_s:g} s") from None
        except SlmrecError as error:
            raise RefusedError(400, error.problem) from None


class _Web(uvicorn.Server):
    """Takes no new connection at the end, yet answers what is on its way over those there are."""

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        for listener in self.servers:
            listener.close()
        await asyncio.sleep(LINGER_S)
        await super().shutdown(sockets)


async def run(server: Server) -> None:
    """Serve until SIGTERM or Ctrl-C; then what was accepted is answered. SIGHUP looks for another bundle."""
    config, swaps = server.config, set[asyncio.Task[bool]]()

    def swap() -> None:
        task = asyncio.get_running_loop().create_task(server.swap())
        swaps.add(task)
        task.add_done_callback(swaps.discard)

    web = _Web(
        uvicorn.Config(
            create_app(server), host=config.host, port=config.port, log_level="warning", access_log=False,
            timeout_graceful_shutdown=max(1, round(2 * config.timeout_s)),
        )
    )  # fmt: skip
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, swap)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when it is done, which is then the end
    watching = asyncio.create_task(server.watch()) if config.watch_s else None
    await web.serve()
    if watching is not None:
        watching.cancel()
    if server.now is not None:
        await server.now.batcher.drain()


def create_app(server: Server) -> FastAPI:
    """The application; `server.now` has to be loaded before it is asked."""
    app = FastAPI(title="slmcompress", version="2", docs_url=None, redoc_url=None)

    @app.middleware("http")
    async def around(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        start, path = time.perf_counter(), _route(request.url.path)
        try:
            _authorize(request, server.token)
            response = await call(request)
        except RefusedError as error:
            response = JSONResponse({"error": str(error)}, status_code=error.status)
        seconds = time.perf_counter() - start
        server.metrics.requests.labels(path, str(response.status_code)).inc()
        server.metrics.seconds.labels(path).observe(seconds)
        if server.now is not None:
            response.headers.setdefault(BUNDLE_HEADER, server.now.hash)
        _log("request", path=path, status=response.status_code, ms=round(1000 * seconds, 2))
        return response

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, status_code=error.status)

    _protocol_routes(app, server)
    _own_routes(app, server)
    return app


def _protocol_routes(app: FastAPI, server: Server) -> None:
    @app.get("/v2")
    async def about() -> dict[str, Any]:
        return {"name": "slmcompress", "version": "2", "extensions": ["binary_tensor_data"]}

    @app.get("/v2/health/live")
    async def live() -> Response:
        return Response(status_code=200)

    @app.get("/v2/health/ready")
    async def ready() -> Response:
        return Response(status_code=200 if server.now is not None else 503)

    @app.get("/v2/models/{name}")
    @app.get("/v2/models/{name}/versions/{version}")
    async def model(name: str, version: str = "1") -> dict[str, Any]:
        served = _served(server, name, version)
        k = served.limits[1]
        inputs = [{"name": one, "datatype": "INT64", "shape": [-1, -1]} for one in INPUTS]
        outputs = [{"name": one, "datatype": kind, "shape": [-1, k]} for one, kind in OUTPUTS.items()]
        return {"name": MODEL, "versions": ["1"], "platform": "onnxruntime_onnx", "inputs": inputs, "outputs": outputs}

    @app.get("/v2/models/{name}/ready")
    @app.get("/v2/models/{name}/versions/{version}/ready")
    async def model_ready(name: str, version: str = "1") -> Response:
        _served(server, name, version)
        return Response(status_code=200)

    @app.post("/v2/models/{name}/infer")
    @app.post("/v2/models/{name}/versions/{version}/infer")
    async def infer(request: Request, name: str, version: str = "1") -> Response:
        served = _served(server, name, version)
        num_items, k = served.limits
        body = await _body(request, server.config.max_body_bytes)
        limits = Limits(num_items, server.config.max_queue, server.config.max_ids)
        try:
            asked: InferRequest = parse_infer(body, _header_length(request), limits)
        except ProtocolError as error:
            raise RefusedError(400, str(error)) from None
        answer = await server.ask(served, asked.histories, k)
        arrays = {"top_items": answer.item_ids, "top_scores": answer.scores}
        content, length = infer_response(asked, (MODEL, "1"), arrays)
        headers = {BUNDLE_HEADER: served.hash}
        if length is not None:
            headers[HEADER_LENGTH] = str(length)
        kind = "application/json" if length is None else "application/octet-stream"
        return Response(content, media_type=kind, headers=headers)


def _own_routes(app: FastAPI, server: Server) -> None:
    @app.post("/recommend")
    async def recommend(request: Request) -> JSONResponse:
        """Best items of one user, by external ids: history, oldest first; exclude; k; strict."""
        served = _served(server, MODEL, "1")
        asked = _asked(await _body(request, server.config.max_body_bytes), served, server.config)
        known = [served.items.internal_ids[item] for item in asked["history"] if item in served.items.internal_ids]
        unknown = [item for item in asked["history"] if item not in served.items.internal_ids]
        if unknown and asked["strict"]:
            raise RefusedError(422, f"{len(unknown)} ids of the history are not in the catalogue")
        server.metrics.dropped.inc(len(unknown))
        excluded = [served.items.internal_ids[item] for item in asked["exclude"] if item in served.items.internal_ids]
        histories = Histories(Ragged.from_rows([known]), Ragged.from_rows([excluded]))
        answer = await server.ask(served, histories, asked["k"])
        kept = answer.item_ids[0] != PAD
        items = answer.item_ids[0][kept].tolist()
        content = {
            "items": [served.items.item_ids[item - 1] for item in items],
            "titles": [served.items.title_of(item) for item in items],
            "scores": answer.scores[0][kept].tolist(),
            "dropped": len(unknown),
        }
        return JSONResponse(content, headers={BUNDLE_HEADER: served.hash})

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        if server.now is not None:
            server.metrics.waiting.set(server.now.batcher.num_waiting)
        return PlainTextResponse(generate_latest(server.metrics.registry).decode())


def _asked(body: bytes, served: Served, config: ServeConfig) -> dict[str, Any]:
    """The fields of a plain request, checked."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise RefusedError(400, "the body is not JSON") from None
    if not isinstance(found, dict):
        raise RefusedError(400, "the body is no JSON object")
    stray = set(found) - {"user", "history", "exclude", "k", "strict"}
    if stray:
        raise RefusedError(400, f"unknown fields: {', '.join(sorted(map(str, stray)))}")
    asked = {"history": found.get("history"), "exclude": found.get("exclude", [])}
    for name, ids in asked.items():
        if not isinstance(ids, list) or not all(
            isinstance(one, str | int) and not isinstance(one, bool) for one in ids
        ):
            raise RefusedError(400, f"{name} has to be a list of item ids")
        if len(ids) > config.max_ids:
            raise RefusedError(400, f"{name} has {len(ids)} ids, possible are {config.max_ids}")
        asked[name] = [str(one) for one in ids]
    most = served.limits[1]
    k = found.get("k", min(10, most))
    if type(k) is not int or not 1 <= k <= most:
        raise RefusedError(400, f"k has to be a whole number from 1 to {most}")
    strict = found.get("strict", False)
    if not isinstance(strict, bool):
        raise RefusedError(400, "strict has to be true or false")
    return asked | {"k": k, "strict": strict}


def _served(server: Server, name: str, version: str) -> Served:
    if server.now is None:
        raise RefusedError(503, "no bundle is loaded yet")
    if (name, version) != (MODEL, "1"):
        raise RefusedError(404, f"there is the model {MODEL}, version 1")
    return server.now


def _authorize(request: Request, token: bytes | None) -> None:
    if token is None or request.url.path in OPEN_PATHS:
        return
    given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
    if not hmac.compare_digest(given, token):
        raise RefusedError(401, "a bearer token is needed")


async def _body(request: Request, most: int) -> bytes:
    """The body, no more of it than may be; nothing compressed."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RefusedError(415, "compressed bodies are not read")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise RefusedError(413, f"the body is longer than {most} bytes")
        parts.append(part)
    return b"".join(parts)


def _header_length(request: Request) -> int | None:
    text = request.headers.get(HEADER_LENGTH)
    if text is None:
        return None
    if not text.isdecimal() or len(text) > 12:
        raise RefusedError(400, f"{HEADER_LENGTH} is no number of bytes")
    return int(text)


def _route(path: str) -> str:
    """A path as metrics and logs name it: nothing that a client chose."""
    parts = path.strip("/").split("/")
    if parts[:2] == ["v2", "models"]:
        return "/v2/models/" + (parts[-1] if parts[-1] in ("infer", "ready") else "about")
    known = ("/v2", "/v2/health/live", "/v2/health/ready", "/recommend", "/metrics", "/openapi.json")
    return path if path in known else "other"


def _log(event: str, **fields: Any) -> None:
    LOG.info(json.dumps({"event": event, "time": round(time.time(), 3), **fields}))

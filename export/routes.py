"""The routes of the server, what stands around them, and the limits that a body keeps before it is read."""

import hmac
import json
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from prometheus_client import generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from export.inference_protocol import INPUTS, OUTPUTS, ProtocolError, infer_response, parse_infer
from export.openapi import BUNDLE_HEADER, HEADER_LENGTH, describe
from export.plain_protocol import parse_recommend, recommend_response
from export.server import FULL_QUEUE, RefusedError, Served, Server, log

MODEL, VERSION = "recommend", "1"
OPEN_PATHS = ("/v2/health/live", "/v2/health/ready")
INFER = f"/v2/models/{MODEL}"
USERS_PATHS = ("/recommend", f"{INFER}/infer", f"{INFER}/versions/{VERSION}/infer")
"""Which bring users, for whom there has to be room."""
RETRY = {"retry-after": "1"}
KNOWN_PATHS = (*OPEN_PATHS, "/v2", "/recommend", "/metrics", "/openapi.json")
Handler = Callable[[Server, Request], Awaitable[Response]]


def create_app(server: Server) -> ASGIApp:
    """The application; `server.now` has to be loaded before it is asked."""
    routes = {
        "/recommend": ("POST", recommend), "/metrics": ("GET", metrics), "/openapi.json": ("GET", description),
        "/v2": ("GET", about), "/v2/health/live": ("GET", live), "/v2/health/ready": ("GET", ready),
    }  # fmt: skip
    for prefix in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        for path, method, handler in (("", "GET", model), ("/ready", "GET", model_ready), ("/infer", "POST", infer)):
            routes[prefix + path] = (method, handler)
    return Around(
        Starlette(
            routes=[Route(path, partial(one, server), methods=[method]) for path, (method, one) in routes.items()],
            exception_handlers={RefusedError: _refused, HTTPException: _not_found, Exception: _failed},
        ),
        server,
    )


class Around:
    """Asks for the token, counts, logs, and names the bundle of every answer."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        start, status, path = time.perf_counter(), 500, _route(scope["path"])

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._name_bundle(message)
            await send(message)

        try:
            await (self._at_the_door(scope) or self.app)(scope, receive, sending)
        finally:
            seconds, counted = time.perf_counter() - start, self.server.metrics
            counted.requests.labels(path, str(status)).inc()
            counted.seconds.labels(path).observe(seconds)
            log("request", path=path, status=status, ms=round(1000 * seconds, 2))

    def _at_the_door(self, scope: Scope) -> Response | None:
        """The answer to a request that is not looked into: no token, or no room for the users that it would bring."""
        if not self._may(scope):
            return _error(401, "a bearer token is needed", {"www-authenticate": "Bearer"})
        now = self.server.now
        if now is None or scope["path"] not in USERS_PATHS or not now.batcher.is_full:
            return None
        return _error(429, FULL_QUEUE, RETRY)

    def _may(self, scope: Scope) -> bool:
        if self.server.token is None or scope["path"] in OPEN_PATHS:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given.removeprefix(b"Bearer "), self.server.token)

    def _name_bundle(self, message: Message) -> None:
        """The bundle that answered, which says so itself; else the one there is now."""
        now, name = self.server.now, BUNDLE_HEADER.encode()
        if now is not None and all(key != name for key, _ in message["headers"]):
            message["headers"] = [*message["headers"], (name, now.hash.encode())]


async def recommend(server: Server, request: Request) -> Response:
    """Best items of one user, by external ids."""
    served = _served(server)
    body = await _body(server, request)
    try:
        asked = parse_recommend(body, served.items, served.limits, served.top_k)
    except ProtocolError as error:
        raise RefusedError(400, str(error)) from None
    for name, count in asked.dropped.items():
        if count:
            server.metrics.dropped.labels(name).inc(count)
    if asked.strict and any(asked.dropped.values()):
        counts = " and ".join(f"{count} ids of {name}" for name, count in asked.dropped.items() if count)
        raise RefusedError(422, f"{counts} are not in the catalogue")
    answer = await server.ask(served, asked.histories, asked.k, asked.allowed)
    return _json(recommend_response(asked, answer, served.items), {BUNDLE_HEADER: served.hash})


async def infer(server: Server, request: Request) -> Response:
    """The Open Inference Protocol's `infer`."""
    served = _served(server, request)
    body = await _body(server, request)
    try:
        asked = parse_infer(body, _header_length(request), served.limits)
    except ProtocolError as error:
        raise RefusedError(400, str(error)) from None
    answer = await server.ask(served, asked.histories, served.top_k)
    arrays = {"top_items": answer.item_ids, "top_scores": answer.scores}
    content, length = infer_response(asked, (MODEL, VERSION), arrays)
    headers = {BUNDLE_HEADER: served.hash}
    if length is not None:
        headers[HEADER_LENGTH] = str(length)
    kind = "application/json" if length is None else "application/octet-stream"
    return Response(content, media_type=kind, headers=headers)


async def about(_: Server, __: Request) -> Response:
    """The server."""
    return _json({"name": "slmcompress", "version": "2", "extensions": ["binary_tensor_data"]})


async def live(_: Server, __: Request) -> Response:
    """Whether it lives."""
    return Response(status_code=200)


async def ready(server: Server, _: Request) -> Response:
    """Whether a bundle is loaded."""
    return Response(status_code=200 if server.now is not None else 503)


async def model(server: Server, request: Request) -> Response:
    """What `infer` takes and gives."""
    served = _served(server, request)
    inputs = [{"name": one, "datatype": "INT64", "shape": [-1, -1]} for one in INPUTS]
    outputs = [{"name": one, "datatype": kind, "shape": [-1, served.top_k]} for one, kind in OUTPUTS.items()]
    tensors = {"inputs": inputs, "outputs": outputs}
    return _json({"name": MODEL, "versions": [VERSION], "platform": "onnxruntime_onnx", **tensors})


async def model_ready(server: Server, request: Request) -> Response:
    """Whether the model is ready."""
    _served(server, request)
    return Response(status_code=200)


async def metrics(server: Server, _: Request) -> Response:
    """For Prometheus."""
    if server.now is not None:
        server.metrics.waiting.set(server.now.batcher.num_waiting)
    return Response(generate_latest(server.metrics.registry), media_type="text/plain")


async def description(server: Server, _: Request) -> Response:
    """OpenAPI, with the limits of the bundle there is now."""
    served = _served(server)
    return _json(describe(MODEL, served.limits, served.top_k, with_token=server.token is not None))


def _served(server: Server, request: Request | None = None) -> Served:
    if server.now is None:
        raise RefusedError(503, "no bundle is loaded yet")
    named = request.path_params if request is not None else {}
    if (named.get("name", MODEL), named.get("version", VERSION)) != (MODEL, VERSION):
        raise RefusedError(404, f"there is the model {MODEL}, version {VERSION}")
    return server.now


async def _body(server: Server, request: Request) -> bytes:
    """The body, no more of it than may be, and nothing compressed."""
    most = server.config.max_body_bytes
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
    if path.startswith("/v2/models/"):
        last = path.rstrip("/").rpartition("/")[2]
        return "/v2/models/" + (last if last in ("infer", "ready") else "about")
    return path if path in KNOWN_PATHS else "other"


def _json(content: dict[str, Any], headers: dict[str, str] | None = None, status: int = 200) -> Response:
    return Response(json.dumps(content), status_code=status, media_type="application/json", headers=headers)


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return _json({"error": message}, headers, status)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    return _error(error.status, str(error), RETRY if error.status == 429 else None)


async def _not_found(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail, dict(error.headers or {}))


async def _failed(_: Request, __: Exception) -> Response:
    return _error(500, "the server failed; its log says where")

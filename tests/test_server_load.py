"""How a server behaves where it has too much to do, and what its settings may be."""

import asyncio
import os

import psutil
import pytest
from click.testing import CliRunner
from served import NUM_ITEMS, Running, make_bundle

from export.batching import NICENESS
from export.routes import create_app
from export.server import Server
from slmrec.cli.main import main
from slmrec.config import DataConfig
from slmrec.errors import ConfigError
from slmrec.interactions import prepare_dataset
from slmrec.serve_config import ServeConfig
from slmrec.synthetic import write_log


@pytest.fixture(scope="module")
def bundle(tiny_model, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    prepare_dataset([write_log(runs / "log.txt", num_items=NUM_ITEMS, num_users=60)], runs / "data", DataConfig())
    return make_bundle(tiny_model, runs, "one")


def test_a_full_queue_is_told_before_a_request_is_read(bundle):
    async def unread():
        raise AssertionError("the body was read")

    async def answer(path, is_full, method="POST"):
        sent = []

        async def send(message):
            sent.append(message)

        server = Server(bundle, ServeConfig())
        served = server.now = await asyncio.to_thread(server.load)
        served.batcher.num_waiting = served.batcher.max_queue if is_full else 0
        scope = {
            "type": "http", "path": path, "raw_path": path.encode(), "method": method, "headers": [], "root_path": "",
            "query_string": b"", "http_version": "1.1", "scheme": "http", "server": ("localhost", 80),
        }  # fmt: skip
        await create_app(server)(scope, unread, send)
        return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}, served.hash

    for path in ("/recommend", "/v2/models/recommend/infer", "/v2/models/recommend/versions/1/infer"):
        status, headers, hash_ = asyncio.run(answer(path, True))
        assert (status, headers["retry-after"], headers["x-bundle-hash"]) == (429, "1", hash_)
        with pytest.raises(AssertionError, match="was read"):
            asyncio.run(answer(path, False))
    for path, method, expected in (("/v2/models/other/infer", "POST", 404), ("/v2/health/ready", "GET", 200)):
        assert asyncio.run(answer(path, True, method))[0] == expected


def test_the_threads_that_compute_yield_to_the_one_that_answers(bundle):
    with Running(bundle, "--threads", "3") as server:  # nobody has asked yet: these are ONNX Runtime's own
        threads = psutil.Process(server.process.pid).threads()
        niceness = {one.id: os.getpriority(os.PRIO_PROCESS, one.id) for one in threads}
        base = niceness.pop(server.process.pid)
        assert list(niceness.values()).count(min(19, base + NICENESS)) >= 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70000},
        {"threads": 10**12},
        {"timeout_s": 0.0},
        {"timeout_s": 1e300},
        {"max_queue": 4, "max_batch": 8},
        {"max_batch": 0},
        {"watch_s": -1.0},
        {"watch_s": float("inf")},
        {"state_mb": -1.0},
        {"state_mb": float("nan")},
        {"state_mb": 1e300},
    ],
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ConfigError):
        ServeConfig(**wrong)


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--token-file", "two"], "holds more than one word"), (["--token-file", "none"], "is empty"),
     (["--device", "cuda"], "served by processors")],
)  # fmt: skip
def test_what_would_serve_nobody_is_refused_at_the_start(bundle, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two").write_text("tok\nx")
    (tmp_path / "none").write_text(" \n")
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(main, ["serve", str(bundle), "--port", "0", *flags], catch_exceptions=False)

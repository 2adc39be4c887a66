"""The server: Triton's own client, concurrent users, overload, hot swap, limits, and what must not be said."""

import asyncio
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.batching import Batcher, QueueFullError
from export.bundle import bundle
from export.inference_protocol import Limits, ProtocolError, parse_infer
from export.onnx_export import export_checkpoint
from export.runtime import OnnxRecommender
from slmrec.artifact import Stage, open_artifact, publish
from slmrec.catalogue import load_catalogue
from slmrec.config import DataConfig, ExportConfig
from slmrec.dataset import load_dataset
from slmrec.errors import CheckError, ConfigError
from slmrec.interactions import prepare_dataset
from slmrec.models.checkpoint import save_checkpoint
from slmrec.ragged import Ragged
from slmrec.recommender import Histories, TopK
from slmrec.serve_config import ServeConfig
from slmrec.synthetic import write_log

NUM_ITEMS = 40


def make_bundle(tiny_model, runs, name, change=0.0):
    import torch

    data = load_dataset(runs / "data")
    model = tiny_model(prompt="none", num_items=data.num_items, positions="compact").eval()
    with torch.no_grad():
        model.item_table.weight.add_(change * torch.randn_like(model.item_table.weight))
    with publish(runs / f"student-{name}", Stage(name="distill", kind="checkpoint", settings={})) as folder:
        save_checkpoint(folder, model)
        data.items.save(folder)
    student = open_artifact(runs / f"student-{name}")
    graph, _ = export_checkpoint(student, data, runs / f"export-{name}", ExportConfig())
    return bundle(graph, data, runs / name)[0].path


@pytest.fixture(scope="module")
def bundles(tiny_model, tmp_path_factory):
    """Two bundles of one catalogue that answer differently."""
    runs = tmp_path_factory.mktemp("runs")
    prepare_dataset([write_log(runs / "log.txt", num_items=NUM_ITEMS, num_users=60)], runs / "data", DataConfig())
    return [make_bundle(tiny_model, runs, "one"), make_bundle(tiny_model, runs, "two", change=1.0)]


class Running:
    """`slmcompress serve` in a process of its own."""

    def __init__(self, bundle_path, *flags, env=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "slmrec.cli.main", "serve", str(bundle_path), "--port", str(self.port), *flags]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **(env or {})}
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True)
        self.reader.start()
        self.url = f"http://127.0.0.1:{self.port}"
        for _ in range(600):
            if self.process.poll() is not None:
                raise AssertionError("".join(self.lines))
            try:
                if httpx.get(self.url + "/v2/health/ready").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError("".join(self.lines))

    def stop(self, signum=signal.SIGTERM):
        self.process.send_signal(signum)
        return self.ended()

    def ended(self):
        code = self.process.wait(30)
        self.reader.join(30)
        self.process.stdout.close()
        return code


@pytest.fixture(scope="module")
def running(bundles, tmp_path_factory):
    link = tmp_path_factory.mktemp("served") / "current"
    link.symlink_to(bundles[0])
    server = Running(link, "--max-queue", "64", "--max-batch", "16")
    server.link = link
    yield server
    assert server.stop() == 0


def requests_of(count, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.permutation(NUM_ITEMS)[: generator.integers(1, 15)] + 1 for _ in range(count)]


def tensors(rows):
    from tritonclient.http import InferInput

    ragged = Ragged.from_rows(rows)
    padded = ragged.pad_left(int(ragged.lengths.max()))
    item = InferInput("item_ids", list(padded.shape), "INT64")
    item.set_data_from_numpy(padded)
    return [item]


def test_tritons_client_reads_metadata_and_gets_what_the_runtime_gives(running, bundles):
    from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

    client = InferenceServerClient(f"127.0.0.1:{running.port}")
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("recommend")
    described = client.get_model_metadata("recommend")
    assert {one["name"]: one["datatype"] for one in described["outputs"]} == {
        "top_items": "INT64",
        "top_scores": "FP32",
    }
    rows = requests_of(9)
    expected = OnnxRecommender(bundles[0]).recommend(Histories.of(Ragged.from_rows(rows)), NUM_ITEMS)
    found = client.infer("recommend", tensors(rows))
    np.testing.assert_array_equal(found.as_numpy("top_items"), expected.item_ids)
    np.testing.assert_array_equal(found.as_numpy("top_scores"), expected.scores)
    excluded = InferInput("exclude_ids", [9, 2], "INT64")
    excluded.set_data_from_numpy(np.repeat([[3, 0]], 9, axis=0), binary_data=False)
    inputs = [*tensors(rows), excluded]
    outputs = [InferRequestedOutput("top_items", binary_data=False)]
    without = client.infer("recommend", inputs, outputs=outputs, request_id="mine")
    assert without.get_response()["id"] == "mine"
    assert 3 not in without.as_numpy("top_items")
    assert without.as_numpy("top_scores") is None
    client.close()


def test_many_users_at_once_get_their_own_answers(running, bundles):
    rows = requests_of(200, seed=1)
    expected = OnnxRecommender(bundles[0]).recommend(Histories.of(Ragged.from_rows(rows)), 10)
    ids = load_catalogue(bundles[0]).item_ids

    def ask(row):
        history = [ids[item - 1] for item in row]
        return httpx.post(running.url + "/recommend", json={"history": history, "k": 10}, timeout=30).json()

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, rows))
    for answer, items, scores in zip(answers, expected.item_ids, expected.scores, strict=True):
        assert answer["items"] == [ids[item - 1] for item in items]
        assert answer["scores"] == scores.tolist()
    metrics = httpx.get(running.url + "/metrics").text
    assert "slmcompress_batch_users_count" in metrics
    counted = [
        line for line in metrics.splitlines() if line.startswith("slmcompress_requests_total") and "/recommend" in line
    ]
    assert float(counted[0].split()[-1]) >= 200


def test_unknown_ids_are_dropped_and_counted_or_refused(running, bundles):
    ids = load_catalogue(bundles[0]).item_ids
    plain = httpx.post(running.url + "/recommend", json={"history": [ids[0], ids[5]]})
    stray = httpx.post(running.url + "/recommend", json={"history": ["no such", ids[0], "other", ids[5]]})
    assert stray.json()["items"] == plain.json()["items"]
    assert (plain.json()["dropped"], stray.json()["dropped"]) == (0, 2)
    strict = httpx.post(running.url + "/recommend", json={"history": ["no such", ids[0]], "strict": True})
    assert (strict.status_code, "1 ids of the history" in strict.json()["error"]) == (422, True)
    nobody = httpx.post(running.url + "/recommend", json={"history": [], "k": 3})
    counts = load_catalogue(bundles[0]).num_interactions
    assert nobody.json()["scores"] == sorted(map(float, counts), reverse=True)[:3]


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("/recommend", b"{", 400), ("/recommend", b"[]", 400), ("/recommend", b"[" * 100_000, 400),
        ("/recommend", b"{}", 400), ("/recommend", b'{"history": "1"}', 400),
        ("/recommend", b'{"history": [true]}', 400),
        ("/recommend", b'{"history": [1.5]}', 400), ("/recommend", b'{"history": [], "k": 0}', 400),
        ("/recommend", b'{"history": [], "k": 1e9}', 400), ("/recommend", b'{"history": [], "strict": 1}', 400),
        ("/recommend", b'{"history": [], "path": "/etc"}', 400), ("/recommend", b"x" * (5 * 2**20), 413),
        ("/recommend", b'{"history": ["1"' + b', "1"' * 10_000 + b"]}", 400),
        ("/v2/models/other/infer", b"{}", 404), ("/v2/models/recommend/versions/9/infer", b"{}", 404),
        ("/v2/models/recommend/infer", b"", 400), ("/v2/systemsharedmemory/region/x/register", b"{}", 404),
        ("/v2/repository/models/recommend/load", b"{}", 404),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_get_a_line_and_no_crash(running, path, content, status):
    answer = httpx.post(running.url + path, content=content, timeout=30)
    assert answer.status_code == status
    assert isinstance(answer.json(), dict)
    assert httpx.get(running.url + "/v2/health/ready").status_code == 200


def test_compressed_bodies_are_refused(running):
    answer = httpx.post(running.url + "/recommend", content=b"x", headers={"content-encoding": "gzip"})
    assert answer.status_code == 415


def test_a_new_bundle_takes_over_under_load_and_a_bad_one_does_not(running, bundles, tmp_path):
    ids = load_catalogue(bundles[0]).item_ids
    rows = requests_of(40, seed=2)
    wanted = {}
    for path in bundles:
        answer = OnnxRecommender(path).recommend(Histories.of(Ragged.from_rows(rows)), 5)
        wanted[open_artifact(path).hash] = [[ids[item - 1] for item in items] for items in answer.item_ids]
    seen, wrong, stop = set(), [], threading.Event()

    def load():
        with httpx.Client(timeout=30) as client:
            while not stop.is_set():
                for number, row in enumerate(rows):
                    asked = {"history": [ids[item - 1] for item in row], "k": 5}
                    answer = client.post(running.url + "/recommend", json=asked)
                    made_by = answer.headers["x-bundle-hash"]
                    seen.add(made_by)
                    if answer.status_code != 200 or answer.json()["items"] != wanted[made_by][number]:
                        wrong.append(answer.text)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    broken = Path(shutil.copytree(bundles[1], tmp_path / "broken"))
    (broken / "model.onnx").write_bytes(b"broken")
    first, second = (open_artifact(path).hash for path in bundles)
    try:
        point_to(running, broken)
        deadline = time.time() + 30
        while not any("swap refused" in line for line in running.lines) and time.time() < deadline:
            time.sleep(0.1)
        assert any("swap refused" in line for line in running.lines)
        assert second not in seen
        point_to(running, bundles[1])
        while second not in seen and time.time() < deadline:
            time.sleep(0.1)
        time.sleep(0.5)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert seen == {first, second}
    assert running.process.poll() is None


def point_to(running, target):
    new = running.link.with_name("new")
    new.symlink_to(target)
    new.rename(running.link)
    running.process.send_signal(signal.SIGHUP)


def test_what_is_accepted_is_answered_before_the_end(bundles):
    server = Running(bundles[0])
    ids = load_catalogue(bundles[0]).item_ids
    outcomes = []

    def ask(number):
        try:
            answer = httpx.post(server.url + "/recommend", json={"history": [ids[number % NUM_ITEMS]]}, timeout=30)
            outcomes.append(answer.status_code)
        except httpx.ConnectError:  # came after the end
            outcomes.append("too late")

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(ask, number) for number in range(300)]
        while len(outcomes) < 50:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        for future in futures:
            future.result()
    assert server.ended() == 0
    assert outcomes.count(200) >= 50
    assert set(outcomes) <= {200, "too late"}
    logged = [json.loads(line) for line in server.lines if line.startswith("{")]
    assert {entry["event"] for entry in logged} == {"request"}
    assert all(set(entry) == {"event", "time", "path", "status", "ms"} for entry in logged)


def test_killed_hard_it_starts_again(bundles):
    server = Running(bundles[0])
    assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    again = Running(bundles[0])
    assert httpx.post(again.url + "/recommend", json={"history": ["1"]}).status_code == 200
    assert again.stop() == 0


def test_a_token_is_asked_for_but_not_by_health_checks(bundles, tmp_path):
    (tmp_path / "token").write_text("s3cret\n")
    server = Running(bundles[0], "--token-file", str(tmp_path / "token"))
    try:
        body = {"history": ["1"]}
        assert httpx.post(server.url + "/recommend", json=body).status_code == 401
        for given, status in (
            ("Bearer wrong", 401),
            ("Bearer s3cret", 200),
            ("", 401),
            ("Bearer \u00e4".encode(), 401),
        ):
            found = httpx.post(server.url + "/recommend", json=body, headers={"authorization": given})
            assert found.status_code == status
        assert httpx.get(server.url + "/metrics").status_code == 401
        assert httpx.get(server.url + "/v2/health/live").status_code == 200
    finally:
        assert server.stop() == 0
    assert not any("s3cret" in line for line in server.lines)


class Gate:
    """A recommender that answers when it is let; scores are the newest items."""

    num_items, max_top_k = 100, 10

    def __init__(self):
        self.open, self.batches = threading.Event(), []

    def recommend(self, histories, k):
        self.open.wait(10)
        self.batches.append(len(histories))
        newest = np.array([row[-1] for row in histories.item_ids], dtype=np.float32)
        return TopK(np.ones((len(newest), k), dtype=np.int64), np.repeat(newest[:, None], k, axis=1))


def users(*newest):
    return Histories.of(Ragged.from_rows([[item] for item in newest]))


def test_what_waits_is_the_next_batch_and_a_full_queue_refuses_at_once():
    gate = Gate()

    async def run():
        batcher = Batcher(gate, max_batch=4, max_queue=8)
        asked = [asyncio.ensure_future(batcher.recommend(users(1), 2, 10))]
        await asyncio.sleep(0.05)  # it is being computed
        asked += [asyncio.ensure_future(batcher.recommend(users(number, number), 3, 10)) for number in (2, 3, 4, 5)]
        await asyncio.sleep(0)
        start = time.perf_counter()
        with pytest.raises(QueueFullError):
            await batcher.recommend(users(6), 1, 10)
        assert time.perf_counter() - start < 0.05
        gate.open.set()
        answers = await asyncio.gather(*asked)
        await batcher.drain()
        assert batcher.num_waiting == 0
        again = await batcher.recommend(users(7), 1, 10)
        return [*answers, again]

    answers = asyncio.run(run())
    assert [answer.scores[:, 0].tolist() for answer in answers] == [[1], [2, 2], [3, 3], [4, 4], [5, 5], [7]]
    assert [answer.scores.shape[1] for answer in answers] == [2, 3, 3, 3, 3, 1]
    assert gate.batches == [1, 4, 4, 1]


def test_a_request_given_up_before_its_turn_is_not_computed():
    gate = Gate()

    async def run():
        batcher = Batcher(gate, max_batch=4, max_queue=8)
        first = asyncio.ensure_future(batcher.recommend(users(1), 1, 10))
        await asyncio.sleep(0.05)
        with pytest.raises(TimeoutError):
            await batcher.recommend(users(2, 2), 1, 0.05)
        gate.open.set()
        await first
        await batcher.drain()
        assert batcher.num_waiting == 0

    asyncio.run(run())
    assert gate.batches == [1]


def test_an_error_reaches_those_who_asked_and_nobody_after_them():
    class Failing(Gate):
        def recommend(self, histories, k):
            if len(histories) == 2:
                raise CheckError("the graph gave NaN scores", remedy="none")
            return super().recommend(histories, k)

    failing = Failing()
    failing.open.set()

    async def run():
        batcher = Batcher(failing, max_batch=4, max_queue=8)
        with pytest.raises(CheckError):
            await batcher.recommend(users(1, 2), 1, 10)
        return await batcher.recommend(users(3), 1, 10)

    assert asyncio.run(run()).scores.tolist() == [[3]]


LIMITS = Limits(num_items=50, max_users=8, max_ids=16)


@given(st.binary(max_size=300), st.one_of(st.none(), st.integers(0, 400)))
@settings(max_examples=300)
def test_any_bytes_are_a_request_or_a_protocol_error(body, header_length):
    try:
        parse_infer(body, header_length, LIMITS)
    except ProtocolError:
        return


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4), max_leaves=8,
)  # fmt: skip
TENSOR = st.fixed_dictionaries(
    {}, optional={
        "name": st.sampled_from(["item_ids", "exclude_ids"]) | JSON, "datatype": st.just("INT64") | JSON,
        "shape": st.lists(st.integers(-1, 20) | st.just(2**62), max_size=3) | JSON, "data": JSON,
        "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": st.integers(-8, 200) | JSON}) | JSON,
    },
)  # fmt: skip


@given(
    st.fixed_dictionaries(
        {"inputs": st.lists(TENSOR, max_size=3) | JSON}, optional={"outputs": JSON, "parameters": JSON, "id": JSON}
    ),
    st.binary(max_size=200),
)  # fmt: skip
@settings(max_examples=400)
def test_any_json_is_a_request_or_a_protocol_error(head, tail):
    text = json.dumps(head).encode()
    try:
        found = parse_infer(text + tail, len(text), LIMITS)
    except ProtocolError:
        return
    else:
        assert 1 <= len(found.histories) <= 8
        assert found.histories.item_ids.values.max(initial=0) <= 50


@given(st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=1, max_size=8), st.booleans())
def test_a_request_in_binary_and_in_json_is_one_request(rows, nested):
    array = np.array(rows, dtype=np.int64)
    tensor = {"name": "item_ids", "datatype": "INT64", "shape": list(array.shape)}
    data = array.tolist() if nested else array.ravel().tolist()
    in_json = parse_infer(json.dumps({"inputs": [tensor | {"data": data}]}).encode(), None, LIMITS)
    head = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": array.nbytes}}]}).encode()
    in_binary = parse_infer(head + array.tobytes(), len(head), LIMITS)
    for found in (in_json, in_binary):
        assert [row.tolist() for row in found.histories.item_ids] == [[i for i in row if i] for row in rows]


@pytest.mark.parametrize(
    "wrong",
    [{"port": 70000}, {"timeout_s": 0.0}, {"max_queue": 4, "max_batch": 8}, {"max_batch": 0}, {"watch_s": -1.0}],
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ConfigError):
        ServeConfig(**wrong)


def test_a_bundle_that_does_not_verify_is_not_served(bundles, tmp_path, caplog):
    from export.server import Server

    broken = Path(shutil.copytree(bundles[0], tmp_path / "broken"))
    (broken / "model.onnx").write_bytes(b"broken")
    with pytest.raises(CheckError, match="does not verify"):
        Server(broken, ServeConfig()).load()
    with caplog.at_level(logging.INFO):
        server = Server(broken, ServeConfig())
        assert asyncio.run(server.swap()) is False
    assert server.now is None
    assert "swap refused" in caplog.text


def test_the_server_needs_no_pytorch():
    script = "import sys, export.server; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"

"""The server: Triton's own client, concurrent users, overload, hot swap, limits, and what must not be said."""

import asyncio
import json
import logging
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from served import NUM_ITEMS, Running, make_bundle

from export.runtime import OnnxRecommender
from export.server import Server
from export.triton_client import recommend
from slmrec.artifact import open_artifact
from slmrec.catalogue import load_catalogue
from slmrec.config import DataConfig
from slmrec.errors import CheckError, ConfigError
from slmrec.interactions import prepare_dataset
from slmrec.ragged import Ragged
from slmrec.recommender import Histories
from slmrec.serve_config import ServeConfig
from slmrec.synthetic import write_log


@pytest.fixture(scope="module")
def bundles(tiny_model, tmp_path_factory):
    """Two bundles of one catalogue that answer differently."""
    runs = tmp_path_factory.mktemp("runs")
    prepare_dataset([write_log(runs / "log.txt", num_items=NUM_ITEMS, num_users=60)], runs / "data", DataConfig())
    return [make_bundle(tiny_model, runs, "one"), make_bundle(tiny_model, runs, "two", change=1.0)]


@pytest.fixture(scope="module")
def running(bundles, tmp_path_factory):
    link = tmp_path_factory.mktemp("served") / "current"
    link.symlink_to(bundles[0])
    with Running(link, "--max-queue", "64", "--max-batch", "16") as server:
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


def test_tritons_python_client_of_a_bundle_gets_its_lists_here_too(running, bundles):
    padding = json.loads((bundles[0] / "triton/padding.json").read_text())
    rows = [row.tolist() for row in requests_of(7, seed=3)]
    expected = OnnxRecommender(bundles[0]).recommend(Histories.of(Ragged.from_rows(rows)), NUM_ITEMS)
    found = recommend(running.url.removeprefix("http://"), "recommend", rows, [[] for _ in rows], padding)
    assert found == [[int(item) for item in items if item] for items in expected.item_ids]
    with pytest.raises(ValueError, match=r"other at .*there is the model recommend"):
        recommend(running.url.removeprefix("http://"), "other", rows, [[] for _ in rows], padding)


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
    assert (strict.status_code, "1 ids of history" in strict.json()["error"]) == (422, True)
    nobody = httpx.post(running.url + "/recommend", json={"history": [], "k": 3})
    counts = load_catalogue(bundles[0]).num_interactions
    assert nobody.json()["scores"] == sorted(map(float, counts), reverse=True)[:3]


def test_an_allow_list_gives_the_best_of_the_allowed(running, bundles):
    ids, rows = load_catalogue(bundles[0]).item_ids, [*requests_of(24, seed=3), np.zeros(0, np.int64)]
    everything = OnnxRecommender(bundles[0]).recommend(Histories.of(Ragged.from_rows(rows)), NUM_ITEMS)
    generator = np.random.default_rng(0)
    allowed = [generator.permutation(NUM_ITEMS)[:number] + 1 for number in range(len(rows))]

    def ask(number):
        asked = {"history": [ids[item - 1] for item in rows[number]], "k": 5}
        free = httpx.post(running.url + "/recommend", json=asked, timeout=30).json()
        asked["allow"] = ["no such", *(ids[item - 1] for item in allowed[number])]
        return free, httpx.post(running.url + "/recommend", json=asked, timeout=30).json()

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(len(rows))))
    for number, (free, answer) in enumerate(answers):
        ranked = [item for item in everything.item_ids[number] if item > 0]
        assert free["items"] == [ids[item - 1] for item in ranked[:5]]
        assert "dropped_allow" not in free
        assert answer["items"] == [ids[item - 1] for item in ranked if item in allowed[number]][:5]
        assert answer["dropped_allow"] == 1
    nobody = httpx.post(running.url + "/recommend", json={"history": [ids[0]], "allow": ["no such"]})
    assert (nobody.status_code, nobody.json()["items"], nobody.json()["dropped_allow"]) == (200, [], 1)
    strict = httpx.post(running.url + "/recommend", json={"history": [ids[0]], "allow": ["no such"], "strict": True})
    assert (strict.status_code, "1 ids of allow" in strict.json()["error"]) == (422, True)


def metric(server, name):
    lines = httpx.get(server.url + "/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(name + " "))


def test_users_who_come_back_are_answered_from_their_states_within_the_budget(bundles):
    ids, full = load_catalogue(bundles[0]).item_ids, OnnxRecommender(bundles[0])
    row = (np.random.default_rng(4).permutation(NUM_ITEMS)[:9] + 1).tolist()
    with Running(bundles[0], "--state-mb", "0.01") as server:
        for length in (5, 6, 6, 8):
            asked = {"history": [ids[item - 1] for item in row[:length]], "k": 5}
            answer = httpx.post(server.url + "/recommend", json=asked).json()
            expected = full.recommend(Histories.of(Ragged.from_rows([row[:length]])), 5)
            assert answer["items"] == [ids[item - 1] for item in expected.item_ids[0]]
            np.testing.assert_allclose(answer["scores"], expected.scores[0], rtol=1e-4)
        assert metric(server, "slmcompress_state_hits_total") == 3
        assert metric(server, "slmcompress_state_misses_total") == 1
        assert 0 < metric(server, "slmcompress_state_bytes") <= 10_000
        assert server.stop() == 0


def test_states_where_the_bundle_has_no_graph_for_them_are_refused(tiny_model, bundles):
    plain = make_bundle(tiny_model, bundles[0].parent, "plain", append=False)
    with pytest.raises(ConfigError, match=r"append\.onnx"):
        Server(plain, ServeConfig(state_mb=1)).load()


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("/recommend", b"{", 400), ("/recommend", b"[]", 400), ("/recommend", b"[" * 100_000, 400),
        ("/recommend", b"{}", 400), ("/recommend", b'{"history": "1"}', 400),
        ("/recommend", b'{"history": [true]}', 400),
        ("/recommend", b'{"history": [1.5]}', 400), ("/recommend", b'{"history": [], "k": 0}', 400),
        ("/recommend", b'{"history": [], "k": 1e9}', 400), ("/recommend", b'{"history": [], "strict": 1}', 400),
        ("/recommend", b'{"history": [], "path": "/etc"}', 400), ("/recommend", b'{"history": [], "allow": null}', 400),
        ("/recommend", b'{"history": [], "allow": [' + b'"1", ' * 10_000 + b'"1"]}', 400),
        ("/recommend", b'{"history": [], "\\ud800": 1}', 400), ("/no such path", b"", 404),
        ("/metrics", b"", 405), ("/recommend", b"x" * (5 * 2**20), 413),
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
    ids = load_catalogue(bundles[0]).item_ids
    outcomes = []

    def ask(number):
        try:
            answer = httpx.post(server.url + "/recommend", json={"history": [ids[number % NUM_ITEMS]]}, timeout=30)
            outcomes.append(answer.status_code)
        except httpx.TransportError:  # its connection was not taken any more
            outcomes.append("too late")

    with Running(bundles[0]) as server:
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
    assert all(set(entry) == {"event", "time", "path", "status", "ms"} for entry in logged)
    answered = [entry for entry in logged if entry["path"] == "/recommend"]
    assert {entry["status"] for entry in answered} == {200}
    assert len(answered) == outcomes.count(200)  # what the server began, its client got


def test_a_request_on_its_way_over_an_open_connection_is_answered_and_no_new_one_taken(bundles):
    with Running(bundles[0]) as server, httpx.Client() as early:
        assert early.get(server.url + "/v2/health/live").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        assert early.post(server.url + "/recommend", json={"history": ["1"]}).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(server.url + "/v2/health/live")
        assert server.ended() == 0


def test_an_address_that_cannot_be_served_on_is_one_message(running, bundles):
    for flags in (["--port", str(running.port)], ["--port", "0", "--host", "nohost.invalid"]):
        command = [sys.executable, "-m", "slmrec.cli.main", "serve", str(bundles[0]), *flags]
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert found.returncode == 2
        assert "cannot be served on" in found.stderr
        assert "Try: another --port" in found.stderr
        assert "serving " not in found.stderr


def test_killed_hard_it_starts_again(bundles):
    with Running(bundles[0]) as server:
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    with Running(bundles[0]) as again:
        assert httpx.post(again.url + "/recommend", json={"history": ["1"]}).status_code == 200
        assert again.stop() == 0


def test_a_token_is_asked_for_but_not_by_health_checks(bundles, tmp_path):
    (tmp_path / "token").write_text("s3cret\n")
    tries = [("Bearer wrong", 401), ("Bearer s3cret", 200), ("", 401), ("Bearer \u00e4".encode(), 401)]
    with Running(bundles[0], "--token-file", str(tmp_path / "token")) as server:
        body = {"history": ["1"]}
        assert httpx.post(server.url + "/recommend", json=body).status_code == 401
        for given, status in tries:
            found = httpx.post(server.url + "/recommend", json=body, headers={"authorization": given})
            assert found.status_code == status
        assert httpx.get(server.url + "/metrics").status_code == 401
        assert httpx.get(server.url + "/v2/health/live").status_code == 200
        assert server.stop() == 0
    assert not any("s3cret" in line for line in server.lines)


def test_a_bundle_that_does_not_verify_is_not_served(bundles, tmp_path, caplog):
    broken = Path(shutil.copytree(bundles[0], tmp_path / "broken"))
    (broken / "model.onnx").write_bytes(b"broken")
    with pytest.raises(CheckError, match="does not verify"):
        Server(broken, ServeConfig()).load()
    with caplog.at_level(logging.INFO):
        server = Server(broken, ServeConfig())
        assert asyncio.run(server.swap()) is False
    assert server.now is None
    assert "swap refused" in caplog.text


def refusals(server):
    return server.metrics.swaps.labels("refused")._value.get()


def test_a_bundle_that_was_refused_is_looked_at_again_when_it_changes_or_is_asked_for(bundles, tmp_path, caplog):
    folder = Path(shutil.copytree(bundles[0], tmp_path / "broken"))
    good = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(b"broken")
    server = Server(folder, ServeConfig())
    for again, count in ((False, 1), (False, 1), (True, 2), (False, 2)):
        assert asyncio.run(server.swap(again=again)) is False
        assert refusals(server) == count
    (folder / "model.onnx").write_bytes(good)
    assert asyncio.run(server.swap(again=False)) is True
    assert server.now is not None
    with caplog.at_level(logging.INFO):
        assert asyncio.run(server.swap(again=False)) is False
        assert caplog.text == ""
        assert asyncio.run(server.swap()) is False
    assert "no other bundle" in caplog.text
    shutil.rmtree(folder)
    for again, count in ((False, 3), (False, 3), (True, 4)):
        assert asyncio.run(server.swap(again=again)) is False
        assert refusals(server) == count


def test_the_server_needs_no_pytorch():
    script = "import sys, export.server; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"

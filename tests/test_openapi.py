"""The description of the server: Schemathesis reads it and asks the real one what it allows and what it does not."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks, positive_data_acceptance
from schemathesis.specs.openapi.checks import ignored_auth
from served import Running, make_bundle

from slmrec.config import DataConfig
from slmrec.interactions import prepare_dataset
from slmrec.synthetic import write_log

TOKEN = "s3cret"
INFER = ("/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer")
HEADERS = {"authorization": f"Bearer {TOKEN}"}
load_all_checks()


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    prepare_dataset([write_log(runs / "log.txt", num_items=40, num_users=60)], runs / "data", DataConfig())
    path = make_bundle(tiny_model, runs, "one")
    with Running(path, "--max-ids", "12", env={"SLMCOMPRESS_TOKEN": TOKEN}) as running:
        yield running
        assert running.stop() == 0


@pytest.fixture(scope="module")
def description(server):
    return schemathesis.openapi.from_url(server.url + "/openapi.json", headers=HEADERS)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize(
    "path", ["/recommend", "/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"]
)
def test_what_is_asked_by_or_against_the_description_gets_an_answer_that_it_has(description, path, mode):
    statuses = asked(description[path]["post"], mode, max_examples=30)
    assert (200 if mode is GenerationMode.POSITIVE else 400) in statuses
    assert statuses <= {200, 400, 401, 404, 422}


def test_every_other_route_answers_as_described(description):
    for found in description.get_all_operations():
        operation = found.ok()
        if operation.method == "get":
            assert 200 in asked(operation, GenerationMode.POSITIVE, max_examples=2)


def asked(operation, mode, max_examples):
    """Ask what Schemathesis makes up, apply all its checks, and give the statuses there were."""
    statuses = set()
    excluded = [ignored_auth]  # it adds the token again; tests of the server ask without
    if operation.path in INFER:
        excluded.append(positive_data_acceptance)

    @settings(
        max_examples=max_examples, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case):
        if mode is GenerationMode.POSITIVE:
            make_fit(case)
        statuses.add(case.call_and_validate(headers=HEADERS, excluded_checks=excluded).status_code)

    ask()
    return statuses


def make_fit(case):
    """What no schema can ask for: ids that are known where it is strict, and a tensor whose shape is its data's."""
    if case.operation.path == "/recommend":
        case.body.pop("strict", None)
    elif case.operation.path in INFER and isinstance(case.body, dict):
        tensor, *_ = case.body["inputs"]
        flat = [one for value in tensor.get("data", []) for one in (value if isinstance(value, list) else [value])]
        given = {"name": "item_ids", "datatype": "INT64", "shape": [1, len(flat[:12])], "data": flat[:12]}
        case.body["inputs"] = [given]
        case.headers.clear()


def test_the_description_has_the_limits_of_what_is_served(server):
    found = httpx.get(server.url + "/openapi.json", headers=HEADERS).json()
    request = found["components"]["schemas"]["RecommendRequest"]["properties"]
    assert {request[name]["maxItems"] for name in ("history", "exclude", "allow")} == {12}
    assert request["k"]["maximum"] == 40
    refusals = set(found["paths"]["/recommend"]["post"]["responses"])
    assert refusals == {"200", "400", "401", "413", "415", "422", "429", "500", "503", "504"}
    assert "404" in found["paths"]["/v2/models/{name}/infer"]["post"]["responses"]

"""The Open Inference Protocol v2: whatever bytes arrive are a request within the limits, or an error of one line."""

import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from export.inference_protocol import Limits, ProtocolError, parse_infer

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

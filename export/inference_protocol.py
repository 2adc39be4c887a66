"""The Open Inference Protocol v2 over HTTP: requests and answers, JSON with binary tensors after it.

A request's JSON is `Inference-Header-Content-Length` bytes long where tensors follow; each has `binary_data_size`.
Source: KServe, "Open Inference Protocol" and Triton's "Binary Tensor Data" extension.
"""

import json
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from slmrec.ragged import Ragged
from slmrec.recommender import Histories

INPUTS = ("item_ids", "exclude_ids")
OUTPUTS = {"top_items": "INT64", "top_scores": "FP32"}
ID_BYTES = 8


class ProtocolError(ValueError):
    """A request that does not keep to the protocol; the message says where."""


@dataclass(frozen=True)
class InferRequest:
    """One call of `infer`."""

    id: str | None
    histories: Histories
    outputs: dict[str, bool]
    """Name -> whether it goes out in binary."""


@dataclass(frozen=True)
class Limits:
    """What a request may hold."""

    num_items: int
    max_users: int
    max_ids: int


def parse_infer(body: bytes, header_length: int | None, limits: Limits) -> InferRequest:
    """Read a request; nothing is allocated before shapes were compared with the limits.

    Raises:
        ProtocolError: it is malformed, beyond the limits, or names ids that do not exist.
    """
    head, tail = _split(body, header_length)
    inputs = head.get("inputs")
    if not isinstance(inputs, list) or not all(isinstance(one, dict) for one in inputs):
        raise ProtocolError("inputs is no list of tensors")
    arrays: dict[str, np.ndarray] = {}
    place = 0
    for tensor in inputs:
        name = tensor.get("name")
        if name not in INPUTS or name in arrays:
            raise ProtocolError(f"the input {name!r}: expected are {' and '.join(INPUTS)}, once each")
        arrays[name], place = _tensor(tensor, name, tail, place, limits)
    if place != len(tail):
        raise ProtocolError(f"{len(tail) - place} bytes after the last tensor")
    if "item_ids" not in arrays:
        raise ProtocolError("the input item_ids is missing")
    items = arrays["item_ids"]
    excluded = arrays.get("exclude_ids", np.zeros((len(items), 0), dtype=np.int64))
    if len(items) != len(excluded):
        raise ProtocolError(f"batches of {len(items)} and {len(excluded)} users")
    request_id = head.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise ProtocolError("id is no text")
    histories = Histories(*(Ragged.from_rows([row[row > 0] for row in ids]) for ids in (items, excluded)))
    return InferRequest(request_id, histories, _wanted(head))


def infer_response(
    request: InferRequest, model: tuple[str, str], arrays: dict[str, np.ndarray]
) -> tuple[bytes, int | None]:
    """The answer's body, and the length of its JSON where binary tensors follow it.

    Args:
        request: what was asked.
        model: name and version.
        arrays: output name -> values.
    """
    outputs, tail = [], b""
    for name, binary in request.outputs.items():
        described: dict[str, Any] = {"name": name, "datatype": OUTPUTS[name], "shape": list(arrays[name].shape)}
        if binary:
            content = np.ascontiguousarray(arrays[name]).tobytes()
            described["parameters"] = {"binary_data_size": len(content)}
            tail += content
        else:
            described["data"] = _json_values(arrays[name])
        outputs.append(described)
    head: dict[str, Any] = {"model_name": model[0], "model_version": model[1], "outputs": outputs}
    if request.id is not None:
        head["id"] = request.id
    text = json.dumps(head).encode()
    return text + tail, len(text) if tail else None


def _json_values(array: np.ndarray) -> list[Any]:
    """Flat values; JSON has no infinity, so a missing item's score is null."""
    return [None if isinstance(value, float) and not np.isfinite(value) else value for value in array.ravel().tolist()]


def _split(body: bytes, header_length: int | None) -> tuple[dict[str, Any], bytes]:
    length = len(body) if header_length is None else header_length
    if not 0 <= length <= len(body):
        raise ProtocolError(f"a header of {length} bytes in a body of {len(body)}")
    try:
        head = json.loads(body[:length])
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not JSON ({type(error).__name__})") from None
    if not isinstance(head, dict):
        raise ProtocolError("the request is no JSON object")
    return head, body[length:]


def _tensor(tensor: dict[str, Any], name: str, tail: bytes, place: int, limits: Limits) -> tuple[np.ndarray, int]:
    shape = tensor.get("shape")
    is_shape = isinstance(shape, list) and len(shape) == 2 and all(type(one) is int and one >= 0 for one in shape)
    if not is_shape or tensor.get("datatype") != "INT64":
        raise ProtocolError(f"{name} has to be INT64 of shape [batch, n]")
    assert isinstance(shape, list)
    if not 1 <= shape[0] <= limits.max_users or shape[1] > limits.max_ids:
        raise ProtocolError(
            f"{name} of shape {shape}: 1 to {limits.max_users} users, at most {limits.max_ids} ids each"
        )
    parameters = tensor.get("parameters") or {}
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is None:
        values = tensor.get("data")
        flat = _flat(values) if isinstance(values, list) else None
        if flat is None or len(flat) != prod(shape):
            raise ProtocolError(f"{name} has to have {prod(shape)} whole numbers as data")
        array = np.array(flat, dtype=np.int64)
    else:
        if size != prod(shape) * ID_BYTES or place + size > len(tail):
            raise ProtocolError(f"{name} has to have {prod(shape) * ID_BYTES} bytes of binary data")
        array = np.frombuffer(tail, dtype="<i8", count=prod(shape), offset=place)
        place += size
    if ((array < 0) | (array > limits.num_items)).any():
        raise ProtocolError(f"{name} holds ids outside 0..{limits.num_items} (0 pads)")
    return array.reshape(shape), place


def _flat(values: list[Any]) -> list[int] | None:
    """Nested lists of numbers as one; None where there is anything else."""
    found: list[int] = []
    for value in values:
        inner = value if isinstance(value, list) else [value]
        if not all(type(one) is int and -(2**63) <= one < 2**63 for one in inner):
            return None
        found += inner
    return found


def _wanted(head: dict[str, Any]) -> dict[str, bool]:
    """Outputs asked for, all where none are named; binary by the request's or the output's own parameter."""
    parameters = head.get("parameters") or {}
    by_default = bool(parameters.get("binary_data_output")) if isinstance(parameters, dict) else False
    named = head.get("outputs")
    if named is None:
        return dict.fromkeys(OUTPUTS, by_default)
    if not isinstance(named, list) or not all(isinstance(one, dict) for one in named) or not named:
        raise ProtocolError("outputs is no list of outputs")
    wanted = {}
    for one in named:
        if one.get("name") not in OUTPUTS:
            raise ProtocolError(f"the output {one.get('name')!r}: there are {' and '.join(OUTPUTS)}")
        own = one.get("parameters") or {}
        wanted[one["name"]] = bool(own.get("binary_data", by_default)) if isinstance(own, dict) else by_default
    return wanted

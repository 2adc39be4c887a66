"""What the server takes and answers, as OpenAPI 3.1: the limits in it are those of the bundle that is served."""

from typing import Any

from export.inference_protocol import INPUTS, OUTPUTS, Limits
from export.plain_protocol import DEFAULT_K

BUNDLE_HEADER = "x-bundle-hash"
HEADER_LENGTH = "inference-header-content-length"
REFUSALS = {
    "400": "The request is malformed or beyond the limits.",
    "401": "A bearer token is needed.",
    "404": "There is no such model, version or path.",
    "413": "The body is too long.",
    "415": "Compressed bodies are not read.",
    "422": "`strict` was asked for, and ids are not in the catalogue.",
    "429": "The queue is full; try again later.",
    "500": "The bundle gave no answer that can be used.",
    "503": "No bundle is loaded yet.",
    "504": "No answer in time.",
}
ASKING = ("413", "415", "429", "500", "504")
"""How a request that has a body and is computed may fail besides."""
Schema = dict[str, Any]


def describe(model: str, limits: Limits, top_k: int, *, with_token: bool) -> Schema:
    """The whole description.

    Args:
        model: name of the one model.
        limits: of requests.
        top_k: length of the longest list.
        with_token: whether requests need a bearer token.
    """
    found: Schema = {
        "openapi": "3.1.0",
        "info": {"title": "slmcompress", "version": "2"},
        "paths": _own_paths() | _server_paths() | _model_paths(model),
        "components": {"schemas": _schemas(limits, top_k)},
    }
    if with_token:
        found["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        for path, operations in found["paths"].items():
            for operation in operations.values():
                if not path.startswith("/v2/health/"):
                    operation["security"] = [{"bearer": []}]
                    operation["responses"]["401"] = _refusal("401")
    return found


def _own_paths() -> Schema:
    recommend = {
        "summary": "Best items of one user, by external ids.",
        "requestBody": {"required": True, "content": _json("RecommendRequest")},
        "responses": _answers("The list.", _json("RecommendResponse"), "400", "422", "503", *ASKING),
    }
    text = {"text/plain": {"schema": {"type": "string"}}}
    document = {"application/json": {"schema": {"type": "object"}}}
    return {
        "/recommend": {"post": recommend},
        "/metrics": {"get": {"summary": "For Prometheus.", "responses": _answers("Metrics.", text)}},
        "/openapi.json": {"get": {"summary": "This.", "responses": _answers("OpenAPI.", document, "503")}},
    }


def _server_paths() -> Schema:
    ready = _answers("It is.", None)
    ready["503"] = {"description": REFUSALS["503"]}
    return {
        "/v2": {"get": {"summary": "The server.", "responses": _answers("It.", _json("ServerMetadata"))}},
        "/v2/health/live": {"get": {"summary": "Whether it lives.", "responses": _answers("It does.", None)}},
        "/v2/health/ready": {"get": {"summary": "Whether a bundle is loaded.", "responses": ready}},
    }


def _model_paths(model: str) -> Schema:
    """Every path of a model, with and without its version."""
    infer_request = {
        "application/json": {"schema": _ref("InferRequest")},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    }
    length = {"name": HEADER_LENGTH, "in": "header", "schema": {"type": "integer", "minimum": 0, "maximum": 10**12 - 1}}
    operations: Schema = {
        "": {"get": {"summary": "The model.", "responses": _answers("It.", _json("ModelMetadata"), "404", "503")}},
        "/ready": {"get": {"summary": "Whether it is ready.", "responses": _answers("It is.", None, "404", "503")}},
        "/infer": {
            "post": {
                "summary": "Best items of many users, by internal ids; binary tensors follow the JSON where told.",
                "parameters": [length],
                "requestBody": {"required": True, "content": infer_request},
                "responses": _answers(
                    "Lists; JSON with binary tensors after it is an octet stream.",
                    _json("InferResponse") | {"application/octet-stream": {}}, "400", "404", "503", *ASKING,
                ),
            }
        },
    }  # fmt: skip
    name, version = (_parameter(one, only) for one, only in (("name", model), ("version", "1")))
    found: Schema = {}
    for prefix, own in (("", [name]), ("/versions/{version}", [name, version])):
        for path, methods in operations.items():
            found["/v2/models/{name}" + prefix + path] = {
                method: operation | {"parameters": [*own, *operation.get("parameters", [])],
                                     "responses": dict(operation["responses"])}
                for method, operation in methods.items()
            }  # fmt: skip
    return found


def _schemas(limits: Limits, top_k: int) -> Schema:
    ids = {"type": "array", "items": {"type": ["string", "integer"]}, "maxItems": limits.max_ids}
    text, number, whole = {"type": "string"}, {"type": "number"}, {"type": "integer", "minimum": 0}
    return {
        "Error": _object({"error": text}),
        "RecommendRequest": _object(
            {
                "history": ids | {"description": "What the user took, oldest first; unknown ids are dropped."},
                "exclude": ids | {"description": "Never to be recommended."},
                "allow": ids | {"description": "Only these may be recommended; unknown ids are dropped."},
                "k": {"type": "integer", "minimum": 1, "maximum": top_k, "default": min(DEFAULT_K, top_k)},
                "strict": {"type": "boolean", "default": False, "description": "Unknown ids are refused with 422."},
                "user": {"description": "Ignored."},
            },
            ["history"],
        ),
        "RecommendResponse": _object(
            {
                "items": {"type": "array", "items": text, "maxItems": top_k},
                "titles": {"type": "array", "items": text},
                "scores": {"type": "array", "items": number},
                "dropped": whole | {"description": "Unknown ids of the history."},
                "dropped_allow": whole | {"description": "Unknown ids of `allow`, where there was one."},
            },
            ["items", "titles", "scores", "dropped"],
        ),
        "ServerMetadata": _object({"name": text, "version": text, "extensions": {"type": "array", "items": text}}),
        "ModelMetadata": _object(
            {
                "name": text,
                "versions": {"type": "array", "items": text},
                "platform": text,
                "inputs": {"type": "array", "items": _metadata(INPUTS, ["INT64"])},
                "outputs": {"type": "array", "items": _metadata(tuple(OUTPUTS), sorted(set(OUTPUTS.values())))},
            }
        ),
        **_infer_schemas(limits),
    }


def _infer_schemas(limits: Limits) -> Schema:
    item = {"type": "integer", "minimum": 0, "maximum": limits.num_items}
    shape = {
        "type": "array", "minItems": 2, "maxItems": 2,
        "prefixItems": [{"type": "integer", "minimum": 1, "maximum": limits.max_users},
                        {"type": "integer", "minimum": 0, "maximum": limits.max_ids}],
    }  # fmt: skip
    data = {"type": "array", "items": {"anyOf": [item, {"type": "array", "items": item}]}}
    size = {"type": "object", "properties": {"binary_data_size": {"type": "integer", "minimum": 0}}}
    tensor = {"name": {"enum": list(INPUTS)}, "datatype": {"const": "INT64"}, "shape": shape, "data": data}
    binary = {"type": "object", "properties": {"binary_data": {"type": "boolean"}}}
    wanted = {"type": "object", "properties": {"name": {"enum": list(OUTPUTS)}, "parameters": binary}}
    default = {"type": "object", "properties": {"binary_data_output": {"type": "boolean"}}}
    values = {"type": "array", "items": {"type": ["number", "null"]}}
    answer = {
        "name": {"enum": list(OUTPUTS)}, "datatype": {"enum": sorted(set(OUTPUTS.values()))},
        "shape": {"type": "array", "items": {"type": "integer"}}, "data": values, "parameters": size,
    }  # fmt: skip
    given = _object(tensor | {"parameters": size}, ["name", "datatype", "shape"]) | {"additionalProperties": True}
    return {
        "InferRequest": {
            "type": "object",
            "required": ["inputs"],
            "properties": {
                "id": {"type": "string"}, "parameters": default,
                "inputs": {"type": "array", "minItems": 1, "maxItems": len(INPUTS), "items": given},
                "outputs": {"type": "array", "minItems": 1, "items": wanted | {"required": ["name"]}},
            },
        },
        "InferResponse": _object(
            {
                "id": {"type": "string"}, "model_name": {"type": "string"}, "model_version": {"type": "string"},
                "outputs": {"type": "array", "items": _object(answer, ["name", "datatype", "shape"])},
            },
            ["model_name", "model_version", "outputs"],
        ),
    }  # fmt: skip


def _object(properties: Schema, required: list[str] | None = None) -> Schema:
    """These properties and no others; all are required unless said otherwise."""
    needed = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


def _metadata(names: tuple[str, ...], kinds: list[str]) -> Schema:
    shape = {"type": "array", "items": {"type": "integer"}}
    return _object({"name": {"enum": list(names)}, "datatype": {"enum": kinds}, "shape": shape})


def _parameter(name: str, only: str) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "const": only}}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(name: str) -> Schema:
    return {"application/json": {"schema": _ref(name)}}


def _refusal(status: str) -> Schema:
    return {"description": REFUSALS[status], "content": _json("Error")}


def _answers(meaning: str, content: Schema | None, *refusals: str) -> Schema:
    """The answer and the refusals; every answer names its bundle."""
    headers = {BUNDLE_HEADER: {"description": "The bundle that answered.", "schema": {"type": "string"}}}
    answer = {"description": meaning, "headers": headers} | ({} if content is None else {"content": content})
    return {"200": answer, **{status: _refusal(status) for status in refusals}}

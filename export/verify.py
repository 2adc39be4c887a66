"""verify: whether a bundle is what was made, and answers here as it did there."""

import json
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.bundle import RULE_FILE, sums
from export.engine_files import ENGINE_FILE, ENGINE_FOLDER, read_engines
from export.golden import stored_golden
from export.parity import Parity, ParityRule, check_other_graphs, compare
from export.runtime import DATA_FILES, GRAPH_FILE, OnnxRecommender
from export.signing import SIGNED_FILE, SUMS_FILE, check_signature
from slmrec.artifact import MANIFEST, open_artifact
from slmrec.errors import ArtifactError, CheckError
from slmrec.recommender import TopK
from slmrec.versions import library_versions


@dataclass
class Verified:
    """A bundle that passed every check."""

    path: Path
    num_files: int
    parity: Parity
    notes: list[str] = field(default_factory=list)
    """What differs from where it was made, such as library versions."""

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return {
            "verified": str(self.path),
            "num_files": self.num_files,
            "golden": self.parity.to_json(),
            "notes": self.notes,
        }

    def to_text(self) -> str:
        """A few lines for people."""
        golden, overlap = self.parity, self.parity.overlap_at_10
        lines = [f"{self.path}: {self.num_files} files are as they were made"]
        lines += [
            f"{golden.num_users} golden requests: {golden.num_equal_lists} equal lists, top-10 overlap {overlap:.4f}"
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes), "verified"])


def verify(path: Path, *, key: Path | None = None, provider: str = "CPUExecutionProvider") -> Verified:
    """Check files first, then load; the first thing that does not hold ends it.

    Order: with a public key, the signature (a bundle without one fails); no link or special file; every byte by
    SHA256SUMS; the manifest's list; external data and file names inside the bundle; versions (differences are noted);
    golden requests by the recorded rule, answered by ONNX Runtime's provider named.

    Raises:
        CheckError: the bundle is not what was made, or does not answer as it did.
        ArtifactError: it is no bundle.
    """
    path = path.resolve()  # a link to a bundle, such as "current", is how bundles are deployed
    if not path.is_dir():
        raise ArtifactError(
            f"{path} is no folder, so it is no bundle", remedy="the folder that slmcompress bundle made"
        )
    if not (path / SUMS_FILE).is_file():
        raise ArtifactError(f"{path} has no {SUMS_FILE}, so it is no bundle", remedy="slmcompress bundle")
    if key is not None:
        check_signature(path, key)
    _require_plain_files(path)
    num_files = _require_sums(path)
    artifact = open_artifact(path, "bundle")
    listed = {MANIFEST, SUMS_FILE, SIGNED_FILE, *artifact.manifest["files"]}
    unlisted = [name for name in _names(path) if name not in listed]
    if unlisted:
        raise _failed(f"{unlisted[0]} is not listed in {MANIFEST}")
    inner = (f"triton/*/*/{GRAPH_FILE}/{GRAPH_FILE}", f"{ENGINE_FOLDER}/*.onnx")
    for graph in [*sorted(path.glob("*.onnx")), *(found for place in inner for found in sorted(path.glob(place)))]:
        _require_data_inside(graph)
    for text in sorted(path.glob("triton/*/config.pbtxt")):
        _require_names_inside(text)
    if (path / ENGINE_FILE).exists():
        read_engines(path)
    made, here = artifact.manifest["versions"], library_versions()
    watched = ("onnxruntime", "numpy")
    notes = [f"{n} is {here.get(n)} here, {made.get(n)} there" for n in watched if here.get(n) != made.get(n)]
    if key is None and (path / SIGNED_FILE).exists():
        notes.append("the signature was not checked (--key)")
    return Verified(path, num_files + (path / SIGNED_FILE).exists(), _golden(path, provider), notes)


def _require_plain_files(path: Path) -> None:
    for entry in [path, *path.rglob("*")]:
        mode = entry.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise _failed(f"{entry.relative_to(path)} is a link or a special file")


def _require_sums(path: Path) -> int:
    """Compare SHA256SUMS byte for byte with what the files give: no file can be changed, added or removed."""
    expected = sums(path)
    try:
        recorded = (path / SUMS_FILE).read_bytes().decode("ascii")
    except UnicodeDecodeError:
        raise _failed(f"{SUMS_FILE} is not ASCII") from None
    if recorded != expected:
        ours, theirs = set(expected.splitlines()), set(recorded.splitlines())
        here, listed = ({line[66:] for line in lines} for lines in (ours, theirs))
        name = next(iter(sorted({line[66:] for line in ours ^ theirs} - {""})), SUMS_FILE)
        if name in here and name not in listed and name != SUMS_FILE:
            raise _failed(f"{name} is not listed in {SUMS_FILE}")
        if name in listed and name not in here and name != SUMS_FILE:
            raise _failed(f"{name} is missing")
        raise _failed(f"{name} is not as {SUMS_FILE} says")
    return len(expected.splitlines()) + 1


def _require_data_inside(graph: Path) -> None:
    """An ONNX file names the files its weights lie in; a name that leads elsewhere would load a stranger's."""
    import onnx

    for tensor in _tensors(onnx.load(graph, load_external_data=False).graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            locations = [entry.value for entry in tensor.external_data if entry.key == "location"]
            if len(locations) != 1 or locations[0] not in DATA_FILES:
                raise _failed(f"{graph.name} reads its weights from {', '.join(map(repr, locations)) or 'nowhere'}")


def _require_names_inside(text: Path) -> None:
    """File names of a Triton configuration stand in its own folders."""
    named = re.findall(
        r'(?:default_model_filename|input_data_file)\s*:\s*"([^"]*)"|value\s*:\s*"([^"]*)"',
        text.read_text(encoding="utf-8", errors="replace"),
    )
    for name in (first or second for first, second in named):
        if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.]*", name) is None:
            raise _failed(f"{text.parent.name}/{text.name} names the file {name!r}")


def _tensors(graph: Any) -> Iterator[Any]:
    """Every constant of a graph: initializers, sparse ones, attributes, and those of the graphs in its branches."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _golden(path: Path, provider: str) -> Parity:
    rule = ParityRule(**json.loads((path / RULE_FILE).read_text(encoding="utf-8")))
    histories, expected = stored_golden(path)
    actual = OnnxRecommender(path, provider=provider).recommend(histories, expected.item_ids.shape[1])
    check_other_graphs(path, histories)
    first = slice(None, 10)
    return compare(
        TopK(expected.item_ids[:, first], expected.scores[:, first]),
        TopK(actual.item_ids[:, first], actual.scores[:, first]),
        rule,
    )


def _names(path: Path) -> list[str]:
    return [entry.relative_to(path).as_posix() for entry in sorted(path.rglob("*")) if entry.is_file()]


def _failed(what: str) -> CheckError:
    return CheckError(
        f"the bundle does not verify: {what}", remedy="fetch it again from where it was made, do not serve it"
    )

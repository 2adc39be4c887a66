"""Optimised graphs kept for the next start, in the user's cache folder and never in an artefact.

An entry belongs to one graph with its data, one ONNX Runtime version and one set of processor features. It is used only
if it lies in a folder that no other user can write to and is what was written there; else it is made anew.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slmrec.artifact import MANIFEST
from slmrec.machine import describe_machine

ENTRY = "entry.json"
GRAPH, DATA = "graph.onnx", "graph.onnx.data"
SMALLEST_EXTERNAL = 1024
"""Bytes of the smallest constant that is kept beside the graph, from where it is mapped."""

Load = Callable[[Path, Any], Any]
"""Path and session options to a session."""


def default_cache() -> Path:
    """`slmcompress/graphs` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slmcompress" / "graphs"


def cached_session(graph: Path, cache: Path, options: Callable[[], Any], load: Load) -> Any:
    """A session of a graph, from its optimised copy where there is a good one; else the copy is made.

    Args:
        graph: `*.onnx` in an artefact folder, whose manifest names the hashes of its files.
        cache: folder of the copies; made with mode 0700, and left alone if others can write to it.
        options: makes session options.
        load: makes a session; called on the copy or on the graph itself.
    """
    key = _key(graph)
    if key is None or not _is_private(cache):
        return load(graph, options())
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    entry = cache / name
    if not _is_good(entry, key):
        return _made(graph, entry, key, options, load)
    import onnxruntime as ort

    settings = options()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return load(entry / GRAPH, settings)


def _key(graph: Path) -> dict[str, Any] | None:
    """What an entry depends on; None outside artefacts, where nothing says what the data files hold."""
    import onnxruntime as ort

    try:
        files = json.loads((graph.parent / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return None
    used = {name: entry["sha256"] for name, entry in sorted(files.items()) if name.endswith(".onnx.data")}
    return {
        "graph": hashlib.sha256(graph.read_bytes()).hexdigest(), "data": used, "onnxruntime": ort.__version__,
        "cpu_flags": describe_machine()["cpu_flags"],
    }  # fmt: skip


def _is_private(folder: Path) -> bool:
    """Whether the folder is ours and nobody else can write to it; made where it is missing."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
    except OSError:  # a disk that cannot be written to has no cache
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


def _is_good(entry: Path, key: dict[str, Any]) -> bool:
    try:
        noted = json.loads((entry / ENTRY).read_text(encoding="utf-8"))
        sizes = {path.name: path.stat().st_size for path in entry.iterdir() if path.name != ENTRY}
        graph = hashlib.sha256((entry / GRAPH).read_bytes()).hexdigest()
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return False
    return bool(noted == {"key": key, "sizes": sizes, "graph": graph})


def _made(graph: Path, entry: Path, key: dict[str, Any], options: Callable[[], Any], load: Load) -> Any:
    """Optimise, keep the result beside its place and rename it; gives the session that was optimised."""
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=entry.parent))
    try:
        settings = options()
        settings.optimized_model_filepath = str(partial / GRAPH)
        for name, value in (
            ("optimized_model_external_initializers_file_name", DATA),
            ("optimized_model_external_initializers_min_size_in_bytes", str(SMALLEST_EXTERNAL)),
        ):
            settings.add_session_config_entry(f"session.{name}", value)
        session = load(graph, settings)
        noted = {
            "key": key,
            "sizes": {path.name: path.stat().st_size for path in partial.iterdir()},
            "graph": hashlib.sha256((partial / GRAPH).read_bytes()).hexdigest(),
        }
        (partial / ENTRY).write_text(json.dumps(noted), encoding="utf-8")
        shutil.rmtree(entry, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process was first, whose copy is as good
            partial.rename(entry)
        return session
    finally:
        shutil.rmtree(partial, ignore_errors=True)

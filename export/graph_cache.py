"""Optimised graphs kept for the next start, in the user's cache folder and never in an artefact.

An entry belongs to one graph with its data, one ONNX Runtime version and one set of processor features. It is used only
if it lies in a folder that no other user can write to and every byte of it is what was written there; else it is made
anew. Whatever goes wrong with the cache, the graph itself is loaded. For the CPU provider alone.
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

from slmrec.artifact import MANIFEST, file_sha256
from slmrec.errors import ArtifactError
from slmrec.machine import cpu_flags

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
    try:
        key = _key(graph)
        if key is not None and _is_private(cache):
            entry = cache / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
            return _kept(entry, key, options, load) or _made(graph, entry, key, options, load)
    except (OSError, ArtifactError):  # a disk that is full or cannot be written to, an entry that went meanwhile
        pass
    return load(graph, options())


def _key(graph: Path) -> dict[str, Any] | None:
    """What an entry depends on; None outside artefacts, where nothing says what the data files hold."""
    import onnxruntime as ort

    try:
        files = json.loads((graph.parent / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return None
    used = {name: entry["sha256"] for name, entry in sorted(files.items()) if name.endswith(".onnx.data")}
    return {"graph": file_sha256(graph), "data": used, "onnxruntime": ort.__version__, "cpu_flags": cpu_flags()}


def _is_private(folder: Path) -> bool:
    """Whether the folder is ours and nobody else can write to it; made where it is missing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


def _kept(entry: Path, key: dict[str, Any], options: Callable[[], Any], load: Load) -> Any:
    """A session of a good entry; None where there is none."""
    import onnxruntime as ort

    if not _is_good(entry, key):
        return None
    settings = options()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return load(entry / GRAPH, settings)


def _is_good(entry: Path, key: dict[str, Any]) -> bool:
    try:
        noted = json.loads((entry / ENTRY).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return False
    return bool(noted == {"key": key, "files": _hashes(entry)})


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.name != ENTRY}


def _made(graph: Path, entry: Path, key: dict[str, Any], options: Callable[[], Any], load: Load) -> Any:
    """Optimise, keep the result beside its place and rename it; gives the session that was optimised.

    Nothing is kept of data files that are not what the manifest says: the entry would serve the good ones as well.
    """
    if any(file_sha256(graph.parent / name) != sha256 for name, sha256 in key["data"].items()):
        return load(graph, options())
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
        (partial / ENTRY).write_text(json.dumps({"key": key, "files": _hashes(partial)}), encoding="utf-8")
        if not _is_good(entry, key):  # else another process was first, and a third may be reading what it made
            shutil.rmtree(entry, ignore_errors=True)
            partial.rename(entry)
        return session
    finally:
        shutil.rmtree(partial, ignore_errors=True)

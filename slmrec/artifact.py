"""Artefact folders: written beside their target and renamed into place, hashed, and aware of their lineage."""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from slmrec.changes import changed_settings
from slmrec.errors import ArtifactError, ConfigError
from slmrec.locks import claimed
from slmrec.versions import library_versions

MANIFEST = "manifest.json"
GATE_FILE = "gate.json"
SCHEMA = 1
"""Version of the manifest's layout; a reader refuses a newer one."""

LATEST = 253_402_300_799  # the last second of the year 9999


@dataclass(frozen=True)
class Artifact:
    """A finished artefact folder whose files were checked against its manifest."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """dataset, checkpoint, graph, engine, bundle or analysis."""
        return str(self.manifest["kind"])

    @property
    def stage(self) -> str:
        """The command that made it, such as "distill"."""
        return str(self.manifest["stage"])

    @property
    def hash(self) -> str:
        """Hash of the content: equal for equal files, whenever and wherever they were written."""
        return str(self.manifest["hash"])

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings of the stage as resolved."""
        return dict(self.manifest["settings"])

    @property
    def stages(self) -> list[str]:
        """Stages this artefact went through, its own last."""
        return [entry["stage"] for entry in self.manifest["lineage"]] + [self.stage]

    @property
    def size_bytes(self) -> int:
        """Bytes of all listed files."""
        return sum(entry["size_bytes"] for entry in self.manifest["files"].values())


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One planned run of a command: what it makes, from what, with which settings."""

    name: str
    kind: str
    settings: Mapping[str, Any]
    parents: Mapping[str, Artifact] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """Changes when the settings or the content of an input change; two runs of one key are the same run."""
        inputs = {name: parent.hash for name, parent in self.parents.items()}
        return canonical_hash({"stage": self.name, "settings": self.settings, "inputs": inputs})


def canonical_hash(value: object) -> str:
    """sha256 of a JSON value, independent of key order.

    >>> canonical_hash({"a": 1, "b": 2}) == canonical_hash({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_up_to_date(output: Path, stage: Stage, *, force: bool) -> bool:
    """True when `output` already holds this very run; an error when it holds another and `force` is not set.

    The caller has the output to itself (`slmrec.locks`).
    """
    _restore_interrupted(output)
    return is_made(output, stage, force=force)


def is_made(output: Path, stage: Stage, *, force: bool) -> bool:
    """As `is_up_to_date`, of a caller that changes nothing."""
    if not output.exists():
        return False
    _require_ours(output)
    if not any(output.iterdir()):
        return False
    manifest = read_manifest(output)
    _require_replaceable(output, manifest, stage)
    if manifest.get("key") == stage.key and not force:
        open_artifact(output)
        return True
    if not force:
        changed = changed_settings(manifest["settings"], stage.settings)
        raise ArtifactError(
            f"{output} was made by {manifest['stage']} with other settings or inputs",
            remedy=f"--force to replace it, or another --output ({changed})",
        )
    return False


@contextlib.contextmanager
def publish(output: Path, stage: Stage, finish: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Give a folder to write into; on success it gets a manifest and becomes `output`, else it is removed.

    `finish` may add files that have to know the manifest, and which it therefore does not list.
    """
    with claimed(output):
        yield from _published(output, stage, finish)


def _published(output: Path, stage: Stage, finish: Callable[[Path], None] | None) -> Iterator[Path]:
    _now()  # a date that cannot be is found before the work is done
    _restore_interrupted(output)
    if output.exists():
        _require_ours(output)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        write_json(partial / MANIFEST, _manifest(partial, output, stage))
        if finish is not None:
            finish(partial)
        for path in [*partial.rglob("*"), partial]:
            _share(path)
            _sync(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    replaced = _replaced(output)
    if output.exists():
        output.rename(replaced)
    partial.rename(output)
    _sync(output.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def work_folder(output: Path) -> Path:
    """Where a long stage keeps what it needs to be resumed; removed when the stage is done."""
    folder = work_path(output)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def work_path(output: Path) -> Path:
    """Where its `work_folder` is, or would be."""
    return output.with_name(f".{output.name}.work")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of an artefact folder, without looking at the other files."""
    if not path.is_dir():
        raise ArtifactError(f"{path} is not a folder", remedy="name an artefact folder made by slmcompress")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            f"{path} has no {MANIFEST}, so it is not an artefact", remedy="name a folder made by slmcompress"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path / MANIFEST} is not readable: {error}", remedy="make the artefact again") from None
    required = {"schema", "kind", "stage", "hash", "files", "settings", "parents", "lineage", "created"}
    if not isinstance(manifest, dict) or not required <= manifest.keys():
        raise ArtifactError(f"{path / MANIFEST} is not an slmcompress manifest", remedy="make the artefact again")
    if manifest["schema"] > SCHEMA:
        raise ArtifactError(
            f"{path} was written by a newer slmcompress (schema {manifest['schema']}, this one reads {SCHEMA})",
            remedy="upgrade slmcompress",
        )
    return manifest


def open_artifact(path: Path, *kinds: str) -> Artifact:
    """Read an artefact of one of the kinds, every file checked against size and sha256 in the manifest."""
    manifest = read_manifest(path)
    if kinds and manifest["kind"] not in kinds:
        raise ArtifactError(
            f"{path} is a {manifest['kind']} (made by {manifest['stage']}), expected a {' or '.join(kinds)}",
            remedy=f"the folder of a {' or '.join(kinds)} in its place",
        )
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise ArtifactError(f"{file} is missing", remedy=f"make {path} again ({manifest['stage']})")
        size_bytes = file.stat().st_size
        if size_bytes != entry["size_bytes"]:
            raise ArtifactError(
                f"{file} has {size_bytes} bytes, its manifest says {entry['size_bytes']}",
                remedy=f"make {path} again ({manifest['stage']})",
            )
        if file_sha256(file) != entry["sha256"]:
            raise ArtifactError(
                f"{file} was altered: its sha256 is not the manifest's",
                remedy=f"make {path} again ({manifest['stage']})",
            )
    return Artifact(path, manifest)


def require_fresh(artifact: Artifact) -> None:
    """Refuse an artefact one of whose ancestors, still lying where it was read, has changed since."""
    for entry in artifact.manifest["parents"].values():
        parent_path = Path(os.path.normpath(artifact.path / entry["path"]))
        if not (parent_path / MANIFEST).is_file():
            continue
        manifest = read_manifest(parent_path)
        if manifest["hash"] != entry["hash"]:
            raise ArtifactError(
                f"{artifact.path} is stale: {parent_path} has changed since {artifact.path} was made from it",
                remedy=f"make {artifact.path} again (slmcompress {artifact.stage} --force, with its settings)",
            )
        require_fresh(Artifact(parent_path, manifest))


def find_artifacts(runs: Path) -> list[Artifact]:
    """Artefacts directly below `runs`, newest first by manifest time; files are not read yet."""
    found = []
    for manifest_path in runs.glob(f"*/{MANIFEST}"):
        if manifest_path.parent.name.startswith("."):
            continue
        found.append(Artifact(manifest_path.parent, read_manifest(manifest_path.parent)))
    return sorted(found, key=lambda artifact: str(artifact.manifest["created"]), reverse=True)


def write_json(path: Path, value: object) -> None:
    """Write indented JSON with sorted keys; NaN and infinity are refused."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def replace_json(path: Path, value: object) -> None:
    """As `write_json`, beside its place and renamed: a killed run leaves the old file or the new."""
    partial = path.with_suffix(".partial")
    write_json(partial, value)
    partial.rename(path)


def _now() -> datetime:
    """The time, or that of SOURCE_DATE_EPOCH, by which builds are repeated to the byte.

    Raises:
        ConfigError: the variable is no number of seconds.
    """
    fixed = os.environ.get("SOURCE_DATE_EPOCH")
    if fixed is None:
        return datetime.now(UTC)
    if not fixed.isdecimal() or int(fixed) > LATEST:
        raise ConfigError(f"SOURCE_DATE_EPOCH={fixed!r} is no number of seconds", remedy="unset it, or date +%s")
    return datetime.fromtimestamp(int(fixed), UTC)


def _manifest(folder: Path, output: Path, stage: Stage) -> dict[str, Any]:
    files = {
        path.relative_to(folder).as_posix(): {"sha256": file_sha256(path), "size_bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return {
        "schema": SCHEMA,
        "kind": stage.kind,
        "stage": stage.name,
        "settings": dict(stage.settings),
        "key": stage.key,
        "files": files,
        "hash": canonical_hash({"kind": stage.kind, "files": {name: entry["sha256"] for name, entry in files.items()}}),
        "created": _now().isoformat(timespec="microseconds"),
        "platform": {"machine": platform.machine(), "system": sys.platform},
        "versions": library_versions(),
        "parents": {
            name: {
                "path": os.path.relpath(parent.path.resolve(), output.resolve()),
                "hash": parent.hash,
                "kind": parent.kind,
                "stage": parent.stage,
            }
            for name, parent in stage.parents.items()
        },
        "lineage": _lineage(stage),
        **_gate(folder),
    }


def _gate(folder: Path) -> dict[str, str]:
    """How an artefact passed its accuracy gate ("passed", "underpowered"), where it had one."""
    path = folder / GATE_FILE
    return {"gate": json.loads(path.read_text(encoding="utf-8"))["gate"]} if path.is_file() else {}


def _lineage(stage: Stage) -> list[dict[str, Any]]:
    """Every ancestor once, oldest first."""
    seen: dict[tuple[str, str], dict[str, Any]] = {}
    for parent in stage.parents.values():
        own = {"stage": parent.stage, "kind": parent.kind, "hash": parent.hash, "settings": parent.settings}
        own |= {"gate": parent.manifest["gate"]} if "gate" in parent.manifest else {}
        for entry in [*parent.manifest["lineage"], own]:
            seen.setdefault((entry["stage"], entry["hash"]), entry)
    return list(seen.values())


def _require_ours(output: Path) -> None:
    if output.is_dir() and not any(output.iterdir()):
        return
    if not (output / MANIFEST).is_file():
        raise ArtifactError(
            f"{output} exists and was not made by slmcompress; it is left as it is",
            remedy="another --output, or move it away yourself",
        )


def _require_replaceable(output: Path, manifest: Mapping[str, Any], stage: Stage) -> None:
    """Refuse, with --force too, to put an artefact in the place of another kind or of what it is made from."""
    if manifest["kind"] != stage.kind:
        raise ArtifactError(
            f"{output} holds a {manifest['kind']} (made by {manifest['stage']}), which no {stage.kind} can replace",
            remedy="another --output, or move it away yourself",
        )
    for name, parent in stage.parents.items():
        if output.resolve() in {path.resolve() for path in _ancestry(parent)}:
            raise ArtifactError(
                f"{output} is what the new {stage.kind} would be made from ({name})", remedy="another --output"
            )


def _ancestry(artifact: Artifact) -> Iterator[Path]:
    """Where an artefact and all its ancestors lie, or lay."""
    yield artifact.path
    for entry in artifact.manifest["parents"].values():
        path = Path(os.path.normpath(artifact.path / entry["path"]))
        if (path / MANIFEST).is_file():
            yield from _ancestry(Artifact(path, read_manifest(path)))


def _share(path: Path) -> None:
    """Give a file the mode that any new file has; some libraries write for the owner alone."""
    if path.is_file():
        mask = os.umask(0)
        os.umask(mask)
        path.chmod(0o666 & ~mask)


def _replaced(output: Path) -> Path:
    return output.absolute().with_name(f".{output.absolute().name}.replaced")  # "." alone has no name


def _restore_interrupted(output: Path) -> None:
    """A run killed between the two renames of `publish` leaves the old artefact aside: put it back."""
    replaced = _replaced(output)
    if replaced.exists():
        if output.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(output)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

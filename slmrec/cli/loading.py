"""Which artefact a command works on, and how any artefact becomes a recommender."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from slmrec.artifact import Artifact, find_artifacts, open_artifact, require_fresh
from slmrec.cli.options import runs_folder, say
from slmrec.errors import ArtifactError

if TYPE_CHECKING:
    from slmrec.recommender import Recommender


def resolve_output(output: Path | None, default: str) -> Path:
    """The folder an artefact is written to."""
    if output is None:
        return runs_folder() / default
    return output if output.name not in ("", "..") else output.resolve()


def choose(path: Path | None, default: str, made_by: str, *kinds: str) -> Artifact:
    """Open the artefact named, or RUNS/default, which it then announces."""
    if path is None:
        path = runs_folder() / default
        if not path.exists():
            raise ArtifactError(f"{path} does not exist{_others(*kinds)}", remedy=made_by)
        say(f"using {path}")
    elif not path.exists():
        raise ArtifactError(f"{path} does not exist{_others(*kinds)}", remedy=made_by)
    artifact = open_artifact(path, *kinds)
    require_fresh(artifact)
    return artifact


def choose_student(path: Path | None, *, wanted: Callable[[Artifact], bool] = lambda artifact: True) -> Artifact:
    """Open the checkpoint named, or the newest one below RUNS that descends from a distillation."""
    if path is not None:
        return choose(path, "", "slmcompress distill", "checkpoint")
    runs = runs_folder()
    students = [
        artifact
        for artifact in find_artifacts(runs)
        if artifact.kind == "checkpoint" and "distill" in artifact.stages and wanted(artifact)
    ]
    if not students:
        raise ArtifactError(f"{runs} holds no student{_others('checkpoint')}", remedy="slmcompress distill")
    say(f"using {students[0].path} (the newest student)")
    return choose(students[0].path, "", "slmcompress distill", "checkpoint")


def load_recommender(artifact: Artifact, device: str = "auto") -> "Recommender":
    """Any artefact that recommends, as what answers `recommend`."""
    if artifact.kind == "checkpoint":
        from slmrec.models.checkpoint import load_checkpoint

        return load_checkpoint(artifact, device)
    if artifact.kind == "engine" and device == "cuda":
        from export.engine_runtime import TensorRTRecommender

        return TensorRTRecommender(artifact.path)
    if artifact.kind in ("graph", "engine", "bundle"):
        from export.runtime import OnnxRecommender

        if artifact.kind == "engine":
            say(f"{artifact.path}: its ONNX graph answers, not its engine (--device cuda)")

        return OnnxRecommender(artifact.path, provider=provider_of(device))
    raise ArtifactError(
        f"{artifact.path} is a {artifact.kind}, which recommends nothing",
        remedy="a checkpoint, graph or bundle (-m/--model)",
    )


def provider_of(device: str) -> str:
    """ONNX Runtime's provider for --device."""
    return "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"


def _others(*kinds: str) -> str:
    found = [str(artifact.path) for artifact in find_artifacts(runs_folder()) if artifact.kind in kinds]
    return f" (there is: {', '.join(found)})" if found else ""

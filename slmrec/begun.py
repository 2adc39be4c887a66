"""Resumable stages: the progress an interrupted run has left is that run's, and no other discards it unasked."""

import json
from pathlib import Path

from slmrec.artifact import (
    Artifact,
    Stage,
    is_up_to_date,
    open_artifact,
    replace_json,
    work_folder,
    work_path,
)
from slmrec.changes import changed_settings
from slmrec.errors import ArtifactError

RUN_FILE = "run.json"
PROGRESS = "*.safetensors"
"""What a run has trained so far, in its work folder."""


def existing(output: Path, stage: Stage, *, force: bool) -> Artifact | None:
    """The artefact in `output` where it is this very run's; else None, and the work folder is noted as this run's.

    Raises:
        ArtifactError: as `is_up_to_date` and `require_own_progress`.
    """
    if is_up_to_date(output, stage, force=force):
        return open_artifact(output)
    require_own_progress(output, stage, force=force)
    note = {"key": stage.key, "stage": stage.name, "settings": dict(stage.settings)}
    replace_json(work_folder(output) / RUN_FILE, note)
    return None


def require_own_progress(output: Path, stage: Stage, *, force: bool) -> None:
    """Keep what an interrupted run of another stage, settings or inputs has trained, unless `force` is set.

    Raises:
        ArtifactError: there is such progress.
    """
    work = work_path(output)
    if force or not (work / RUN_FILE).exists() or not any(work.glob(PROGRESS)):
        return
    begun = json.loads((work / RUN_FILE).read_text(encoding="utf-8"))
    if begun["key"] != stage.key:
        changed = f" ({changed_settings(begun['settings'], stage.settings)})" if begun["stage"] == stage.name else ""
        raise ArtifactError(
            f"{output} was begun by {begun['stage']} with other settings or inputs, and can still go on",
            remedy=f"the settings it was begun with, --force to discard its progress, or another --output{changed}",
        )

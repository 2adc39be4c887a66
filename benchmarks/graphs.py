"""Models as they are shipped: their graphs on ONNX Runtime, which also rank several times as many users a second."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from export.onnx_export import export_model
from export.runtime import OnnxRecommender
from slmrec.config import ExportConfig
from slmrec.models.decoder import DecoderModel


@contextlib.contextmanager
def as_graph(model: DecoderModel, **settings: bool) -> Iterator[OnnxRecommender]:
    """The graph of a model, in a folder that goes with it."""
    with tempfile.TemporaryDirectory() as folder:
        export_model(model.eval(), Path(folder), replace(ExportConfig(append=False), **settings))  # type: ignore[arg-type]
        yield OnnxRecommender(Path(folder))

"""Checkpoint folders: `config.json`, `model.safetensors`, `items.parquet`, and back to a model."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from slmrec.artifact import Artifact, Stage, open_artifact, publish, work_folder, write_json
from slmrec.catalogue import ITEMS_FILE, Catalogue, load_catalogue
from slmrec.config import RecipeConfig, SasrecConfig, TrainConfig, WindowConfig
from slmrec.errors import ArtifactError, CheckError
from slmrec.models.decoder import DecoderModel, DecoderSpec
from slmrec.models.layers import Int8Linear
from slmrec.models.llm_int8 import dequantizing, is_llm_int8, llm_int8, transformers_settings
from slmrec.models.ranking import TorchRecommender
from slmrec.models.sasrec import Sasrec
from slmrec.writing import save_tensors

CONFIG_FILE, WEIGHTS_FILE, TRAINING_FILE = "config.json", "model.safetensors", "training.jsonl"
DECODER_FOLDER, TOKEN_EMBEDDING = "decoder", "embed_tokens.weight"
"""Where an LLM.int8 checkpoint keeps its decoder, as transformers' `from_pretrained` reads it."""


def save_checkpoint(folder: Path, model: Sasrec | DecoderModel, training: list[dict[str, Any]] | None = None) -> None:
    """Write a model, and the curves of its training where there are any; the catalogue is saved apart."""
    config, weights = _to_json(model), model.state_dict()
    write_json(folder / CONFIG_FILE, config)
    if config.get("quantization", {}).get("backend") == "bitsandbytes":
        assert isinstance(model, DecoderModel)
        weights = _save_llm_int8(folder / DECODER_FOLDER, model)
    save_tensors(folder / WEIGHTS_FILE, weights)
    if training:
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in training)
        (folder / TRAINING_FILE).write_text(lines, encoding="utf-8")


def publish_checkpoint(
    output: Path, stage: Stage, model: Sasrec | DecoderModel, training: list[dict[str, Any]], items: Catalogue
) -> Artifact:
    """Make a trained model an artefact, on the CPU, and remove what its training kept to be resumed."""
    work = work_folder(output)
    with publish(output, stage) as folder:
        save_checkpoint(folder, model.cpu(), training)
        items.save(folder)
    shutil.rmtree(work)
    return open_artifact(output)


def build_model(artifact: Artifact) -> Sasrec | DecoderModel:
    """The model of a checkpoint artefact with random weights: its shapes, as a plan needs them."""
    config = json.loads((artifact.path / CONFIG_FILE).read_text(encoding="utf-8"))
    model = _from_json(config)
    quantization = config.get("quantization", {})
    made = llm_int8 if quantization.get("backend") == "bitsandbytes" else Int8Linear.from_linear
    for name in quantization.get("layers", []):
        replace_linear(model, name, made(linear_at(model, name)))
    return model


def load_model(artifact: Artifact) -> Sasrec | DecoderModel:
    """The model of a checkpoint artefact, on the CPU, in training mode."""
    model = build_model(artifact)
    weights = load_file(artifact.path / WEIGHTS_FILE)
    if (artifact.path / DECODER_FOLDER).is_dir():
        decoder = load_file(artifact.path / DECODER_FOLDER / WEIGHTS_FILE)
        weights |= {f"decoder.{name}": value for name, value in decoder.items() if name != TOKEN_EMBEDDING}
    model.load_state_dict(weights)
    return model


def load_decoder(artifact: Artifact) -> DecoderModel:
    """The model of a checkpoint that has to be a decoder (a teacher or a student)."""
    return require_decoder(load_model(artifact), artifact)


def require_finite(model: nn.Module) -> None:
    """Refuse weights that are not finite: 8-bit rounding would make numbers, and lists, of them."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckError(f"{name} is not finite (NaN or infinite)", remedy="make the checkpoint again")


def require_decoder(model: Sasrec | DecoderModel, artifact: Artifact) -> DecoderModel:
    """The model, unless it is of another kind than a decoder."""
    if not isinstance(model, DecoderModel):
        raise ArtifactError(
            f"{artifact.path} is a {artifact.stage} checkpoint without a decoder",
            remedy="a teacher or student (-m/--model)",
        )
    return model


def load_checkpoint(artifact: Artifact, device: str = "auto") -> TorchRecommender:
    """The model of a checkpoint artefact as a recommender."""
    has_items = (artifact.path / ITEMS_FILE).is_file()
    known = load_catalogue(artifact.path).num_interactions if has_items else None
    counts = None if known is None else np.array(known, dtype=np.int64)
    return TorchRecommender(load_model(artifact), device, num_interactions=counts)


def quantized_layers(model: nn.Module) -> list[str]:
    """Names of the 8-bit layers, in the model's order."""
    modules = model.named_modules()
    return [name for name, module in modules if isinstance(module, Int8Linear) or is_llm_int8(module)]


def with_neutral_layers(model: DecoderModel) -> DecoderModel:
    """The model, LLM.int8 layers replaced by such of the same integers as every backend has."""
    for name in quantized_layers(model):
        layer = model.get_submodule(name)
        if is_llm_int8(layer):
            replace_linear(model, name, dequantizing(layer))
    return model


def linear_at(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer of that name."""
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def replace_linear(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put another layer in place of the one named."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)


def _to_json(model: Sasrec | DecoderModel) -> dict[str, Any]:
    if isinstance(model, Sasrec):
        return {"architecture": "sasrec", "num_items": model.num_items, "sasrec": asdict(model.config)}
    config: dict[str, Any] = {"architecture": "decoder", "spec": asdict(model.spec)}
    layers = quantized_layers(model)
    if layers:
        foreign = is_llm_int8(model.get_submodule(layers[0]))
        config["quantization"] = {
            "bits": 8, "backend": "bitsandbytes" if foreign else "neutral",
            "weights": "int8 symmetric per output channel",
            "activations": "int8 symmetric per token, dynamic" + ("; outlier columns in fp16" if foreign else ""),
            "layers": layers,
        }  # fmt: skip
    return config


def _save_llm_int8(folder: Path, model: DecoderModel) -> dict[str, Tensor]:
    """Write the decoder as transformers loads it; gives the weights that are not its."""
    weights = model.state_dict()
    layers = {name.removeprefix("decoder.") for name in quantized_layers(model)}
    kept = [name for name, module in model.decoder.named_modules() if isinstance(module, nn.Linear)]
    settings = model.decoder.config.to_dict() | {
        "quantization_config": transformers_settings([name for name in kept if name not in layers]),
        "architectures": [type(model.decoder).__name__],
    }
    decoder = {name.removeprefix("decoder."): v for name, v in weights.items() if name.startswith("decoder.")}
    decoder[TOKEN_EMBEDDING] = torch.zeros(1, model.hidden_size)
    folder.mkdir()
    write_json(folder / CONFIG_FILE, settings)
    save_tensors(folder / WEIGHTS_FILE, decoder, {"format": "pt"})
    return {name: value for name, value in weights.items() if not name.startswith("decoder.")}


def _from_json(config: Mapping[str, Any]) -> Sasrec | DecoderModel:
    if config["architecture"] == "sasrec":
        settings = dict(config["sasrec"])
        if "supervision" not in settings:
            raise ArtifactError(
                "this SASRec checkpoint was written by slmcompress before its norms and positions changed",
                remedy="make it again (slmcompress train-items)",
            )
        settings["window"] = WindowConfig(**settings["window"])
        settings["train"] = TrainConfig(**settings["train"])
        return Sasrec(SasrecConfig(**settings), config["num_items"])
    spec = dict(config["spec"])
    spec["recipe"] = RecipeConfig(**spec["recipe"])
    spec["masked_ids"] = tuple(spec.get("masked_ids", ()))  # written since teachers can be imported
    return DecoderModel(DecoderSpec(**spec))

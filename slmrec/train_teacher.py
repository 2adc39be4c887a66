"""train-teacher: the first layers of a pretrained decoder as a recommender (E4SRec, arXiv:2312.02443)."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from slmrec.artifact import Artifact, Stage, canonical_hash, file_sha256, work_folder
from slmrec.begun import existing
from slmrec.config import RecipeConfig, TeacherConfig, TrainConfig, WindowConfig, settings_of
from slmrec.dataset import Dataset, require_same_items
from slmrec.errors import ArtifactError, ConfigError, DataError
from slmrec.evaluate import validation_ndcg
from slmrec.locks import one_run_at_a_time
from slmrec.models.checkpoint import build_model, load_model, publish_checkpoint
from slmrec.models.decoder import DecoderModel, DecoderSpec, decoder_settings
from slmrec.models.prompt import prompt_embeddings, prompt_texts, token_ids
from slmrec.models.ranking import TorchRecommender, resolve_device
from slmrec.models.sasrec import Sasrec
from slmrec.models.titles import title_vectors
from slmrec.plan import Plan, plan_training
from slmrec.processes import connect, on_main
from slmrec.samples import NextItemObjective, Samples, training_samples
from slmrec.sequences import validation_cases
from slmrec.sharding import asked_to_shard
from slmrec.sources import backbone_folder
from slmrec.train import Task, computes_in_bf16, train

ITEM_PARAMETERS = ("item_table", "item_proj", "user_proj", "item_head", "title_input", "title_table", "adapters")
"""Parameters that learn at the item learning rate; all others belong to the decoder."""


@dataclass(frozen=True)
class Backbone:
    """A pretrained decoder, cut to its first layers."""

    name: str
    folder: Path
    decoder: Any
    """The transformers model, token embedding included."""

    @property
    def embeddings(self) -> Tensor:
        """Token embeddings, [vocabulary, hidden]."""
        return self.decoder.embed_tokens.weight.detach()  # type: ignore[no-any-return]

    @property
    def token_rms(self) -> float:
        """Root mean square of a token embedding's entries: the scale a decoder expects at its input."""
        return float(self.embeddings.pow(2).mean().sqrt())


def load_backbone(name: str, num_layers: int) -> Backbone:
    """Load the first layers of a named source, a local folder or a hub id, in fp32."""
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    logging.set_verbosity_error()  # it lists the layers that are left out as unexpected
    logging.disable_progress_bar()
    folder = backbone_folder(name)
    config = AutoConfig.from_pretrained(folder)
    decoder_settings(config, num_layers)  # refuses another family or too many layers before anything is loaded
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    try:
        decoder, found = AutoModel.from_pretrained(
            folder, config=config, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True,
            output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(
            f"the backbone {folder} does not load: {str(error).splitlines()[0]}",
            remedy="a Hugging Face folder whose config.json and safetensors belong together",
        ) from None
    if found["missing_keys"]:
        raise DataError(
            f"the backbone {folder} lacks {len(found['missing_keys'])} tensors, such as {min(found['missing_keys'])}",
            remedy="a Hugging Face folder whose config.json and safetensors belong together",
        )
    return Backbone(name, folder, decoder)


def backbone_hash(name: str) -> str:
    """Hash of a backbone's config, weights and tokenizer."""
    folder = backbone_folder(name)
    words = sorted(path for path in folder.glob("tokenizer*") if path.is_file())
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors")), *words]
    return canonical_hash({file.name: file_sha256(file) for file in files})


def require_item_table(model: Sasrec | DecoderModel, items: Artifact) -> Sasrec:
    """The model, unless it is of another kind than SASRec."""
    if not isinstance(model, Sasrec):
        raise ArtifactError(f"{items.path} holds no item table", remedy="slmcompress train-items")
    return model


def build_teacher(config: TeacherConfig, items: Artifact, data: Dataset) -> DecoderModel:
    """A teacher before training: pretrained layers, the item table of `items`, title vectors where known."""
    sasrec = require_item_table(load_model(items), items)
    backbone = load_backbone(config.backbone, config.num_layers)
    texts = prompt_embeddings(backbone.folder, backbone.embeddings, config.recipe.prompt)
    torch.manual_seed(config.train.seed)
    settings = decoder_settings(backbone.decoder.config, config.num_layers)
    spec = _spec(config, settings, (len(texts[0]), len(texts[1])), sasrec.config.hidden_size, data)
    model = pretrained_model(spec, backbone, texts)
    with torch.no_grad():
        model.item_table.weight.copy_(sasrec.item_table.weight)
        if model.titles is not None:
            model.titles.copy_(title_vectors(data.items, backbone.folder, backbone.embeddings))
    scale_item_inputs(model, backbone.token_rms)
    return model


@torch.no_grad()
def pretrained_model(spec: DecoderSpec, backbone: Backbone, texts: tuple[Tensor, Tensor]) -> DecoderModel:
    """A recommender with a backbone's layers and instruction; items and head are random.

    Args:
        spec: of as many layers as the backbone was loaded with.
        backbone: where the layers come from.
        texts: embeddings before and after the items, [prefix, hidden] and [suffix, hidden].
    """
    model = DecoderModel(spec)
    weights = {name: value for name, value in backbone.decoder.state_dict().items() if "embed_tokens" not in name}
    model.decoder.load_state_dict(weights)
    model.prefix.copy_(texts[0])
    model.suffix.copy_(texts[1])
    return model


def teacher_shape(config: TeacherConfig, items: Artifact, data: Dataset) -> DecoderModel:
    """The teacher as it is trained, on the "meta" device: shapes without weights, from the backbone's config alone."""
    from transformers import AutoConfig

    require_same_items(items, data)
    folder = backbone_folder(config.backbone, weights=False)
    settings = decoder_settings(AutoConfig.from_pretrained(folder), config.num_layers)
    prefix, suffix = (len(token_ids(folder, text)) for text in prompt_texts(config.recipe.prompt))
    with torch.device("meta"):
        spec = _spec(
            config, settings, (prefix, suffix), require_item_table(build_model(items), items).config.hidden_size, data
        )
        model = DecoderModel(spec)
        prepare_training(model, config)
    return model


def _spec(
    config: TeacherConfig, decoder: dict[str, Any], prompt: tuple[int, int], item_dim: int, data: Dataset
) -> DecoderSpec:
    return DecoderSpec(
        decoder=decoder,
        recipe=config.recipe,
        num_items=data.num_items,
        item_dim=item_dim,
        max_history=config.window.max_history,
        prefix_length=prompt[0],
        suffix_length=prompt[1],
        has_titles=config.recipe.titles == "auto" and data.items.has_titles,
        backbone=config.backbone,
        share_prefix=config.share_prefix,
    )


def require_prefix_shareable(spec: DecoderSpec, config: TrainConfig) -> None:
    """Refuse to share the instruction where a layer that reads it twice in a step would go wrong.

    Raises:
        ConfigError: gradients are checkpointed, or weights sharded (FSDP2 frees a layer's after its first use).
    """
    if spec.shares_prefix and (config.checkpoint_gradients or asked_to_shard()):
        what = "gradient checkpointing" if config.checkpoint_gradients else "FSDP"
        raise ConfigError(f"the shared instruction and {what} exclude each other", remedy="--no-share-prefix")


@torch.no_grad()
def scale_item_inputs(model: DecoderModel, token_rms: float) -> None:
    """Start item inputs at the RMS of token embeddings, and titles at nothing: their maps are learned from zero."""
    vectors = model.item_proj(model.item_table.weight[1:])
    model.item_proj.weight.mul_(token_rms / vectors.pow(2).mean().sqrt())
    model.item_proj.bias.zero_()
    for title_map in (model.title_input, model.title_table):
        if title_map is not None:
            title_map.weight.zero_()


def plan_teacher(model: DecoderModel, config: TeacherConfig, samples: Samples, device: str) -> Plan:
    """What training would take; neither the backbone's weights nor a tokenizer that no prompt needs are read."""
    bf16 = computes_in_bf16(config.train, resolve_device(device))
    return plan_training(model, NextItemObjective(model), samples, config.train, bf16=bf16)


def teacher_samples(recipe: RecipeConfig, window: WindowConfig, data: Dataset) -> Samples:
    """What a teacher, and after it its student, is trained on."""
    return training_samples(data.sequences, window, recipe.supervision, after_suffix=recipe.prompt == "slmrec")


def teacher_stage(config: TeacherConfig, items: Artifact, data: Dataset) -> Stage:
    """The run as a manifest names it."""
    settings = settings_of(config, hashed=["backbone"]) | {"backbone_hash": backbone_hash(config.backbone)}
    parents = {"items": items, "data": data.artifact}
    return Stage(name="train-teacher", kind="checkpoint", settings=settings, parents=parents)


@one_run_at_a_time
def train_teacher(
    items: Artifact, data: Dataset, output: Path, config: TeacherConfig, *, device: str = "auto", force: bool = False
) -> tuple[Artifact, bool]:
    """Train the teacher; gives the artefact and whether it was there already."""
    require_same_items(items, data)
    stage = teacher_stage(config, items, data)
    target = resolve_device(device)
    connect(target)
    there = on_main(lambda: existing(output, stage, force=force))
    if there is not None:
        return there, True
    model = build_teacher(config, items, data)
    prepare_training(model, config)
    log = _fit(model, data, config, (work_folder(output), stage.key, target))
    if config.tuning == "lora":
        model.decoder = model.decoder.merge_and_unload()
    return on_main(lambda: publish_checkpoint(output, stage, model, log, data.items)), False


def prepare_training(model: DecoderModel, config: TeacherConfig) -> None:
    """What is set up around the decoder's layers for training alone: LoRA, checkpoints of activations."""
    require_prefix_shareable(model.spec, config.train)
    if config.tuning == "lora":
        model.decoder = _with_lora(model.decoder)
    if config.train.checkpoint_gradients:
        model.checkpoint_gradients()


def _fit(
    model: DecoderModel, data: Dataset, config: TeacherConfig, run: tuple[Path, str, torch.device]
) -> list[dict[str, Any]]:
    work, key, target = run
    samples = teacher_samples(config.recipe, config.window, data)
    cases = validation_cases(data.sequences)
    task = Task(
        title="train-teacher",
        objective=NextItemObjective(model),
        lengths=samples.lengths,
        batch=samples.batch,
        validate=lambda: validation_ndcg(TorchRecommender(model, target.type), cases),
        item_parameters=ITEM_PARAMETERS,
    )
    return train(task, config.train, work, key, target).log


def _with_lora(decoder: Any) -> Any:
    """LoRA r=16, alpha=16, dropout 0.05 on gate, up and down projections; the base frozen (SLMRec, appendix)."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=16, lora_alpha=16, lora_dropout=0.05, target_modules=["gate_proj", "up_proj", "down_proj"])
    with warnings.catch_warnings():  # PEFT asks transformers for a name that it is about to lose
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(decoder, lora)

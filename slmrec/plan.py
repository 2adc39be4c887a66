"""What a training run will take, worked out from shapes alone: nothing is loaded and nothing is computed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from slmrec.config import TrainConfig
from slmrec.models.decoder import DecoderModel
from slmrec.processes import process_count
from slmrec.samples import Samples
from slmrec.sharding import asked_to_shard

FP32_BYTES, BF16_BYTES = 4, 2
LOGIT_COPIES = 3
"""Score matrices alive at once in the backward pass of a cross-entropy: log-probabilities and two gradients."""

HOW_ACTIVATIONS = (
    "what the gradient needs, at most, for the longest micro-batch: per layer and token, norms keep 4 hidden vectors "
    "in fp32 and what linear maps read of them, attention 4 vectors as wide as its queries, the MLP 4 inner vectors; "
    "per target, a row of scores in fp32 for each cross-entropy and two more; no allocator slack, no buffers of "
    "communication"
)

GROUPS = {
    "lora_": "lora", "decoder.": "decoder", "item_table": "items", "item_proj": "items", "user_proj": "head",
    "item_head": "head", "title_": "titles", "adapters": "adapters", "projections": "projections",
}  # fmt: skip
"""Part of a parameter's name -> the group it is counted in; the first that fits."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one micro-batch puts on a device, at most."""

    rows: int
    """Sequences."""
    tokens: int
    """Of a sequence through the layers, its instruction included where it is not shared."""
    shared: int
    """Instruction tokens that are computed once for all rows; each row attends to them."""
    targets: int
    """Of all rows."""
    score_matrices: int
    """Cross-entropies over the catalogue: the head's, and one per block with multiple supervision."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of a training run."""

    parameters: Mapping[str, int]
    """By group, with `total` and `trainable`."""
    memory_per_device_bytes: Mapping[str, int]
    """By use, with `total`."""
    tokens_per_epoch: Mapping[str, int]
    """Positions that the decoder computes: items, prompt (instruction and response), total."""
    num_processes: int
    micro_batches: int
    """Of a step on each device."""
    feature_store_bytes: int | None = None
    """On disk, of the features that a student needs; of a teacher's plan, that a student of four blocks will need."""
    teacher_weights_bytes: int | None = None
    """On the main process's device while the store is filled, before the student's training."""

    def to_json(self) -> dict[str, Any]:
        """Named fields, units in their names."""
        fields = {name: value for name, value in vars(self).items() if value is not None}
        plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in fields.items()}
        return plain | {"activations_estimate": HOW_ACTIVATIONS}

    def to_text(self) -> str:
        """A few lines for the terminal."""
        lines = [
            _listed("parameters (millions)", self.parameters, 1e6),
            _listed("memory per device (MB)", self.memory_per_device_bytes, 1e6),
            _listed("tokens an epoch (millions)", self.tokens_per_epoch, 1e6),
            f"{self.num_processes} processes, {self.micro_batches} micro-batches a step on each",
        ]
        if self.feature_store_bytes is not None:
            written = (
                "once a student is distilled from it"
                if self.teacher_weights_bytes is None
                else f"written by a teacher of {self.teacher_weights_bytes / 1e6:,.1f} MB"
            )
            lines.append(f"teacher's features: {self.feature_store_bytes / 1e6:,.1f} MB on disk, {written}")
        return "\n".join([*lines, f"activations: {HOW_ACTIVATIONS}"])


def plan_training(
    model: DecoderModel, objective: nn.Module, samples: Samples, config: TrainConfig, *, bf16: bool
) -> Plan:
    """Sizes of a run of THE loop, from a model on any device, "meta" included.

    Args:
        model: what is trained, prepared for training (LoRA, checkpoints).
        objective: `model` and what is trained with it.
        samples: what it is trained on.
        config: the loop's settings.
        bf16: whether the decoder computes in bfloat16.
    """
    load = load_of(model, objective, samples, config)
    parameters = _parameters(objective)
    states = _state_bytes(model, objective, bf16=bf16)
    activations = activation_bytes(model, load, bf16=bf16, checkpointed=config.checkpoint_gradients)
    memory = states | {"activations": activations}
    return Plan(
        parameters=parameters,
        memory_per_device_bytes=memory | {"total": sum(memory.values())},
        tokens_per_epoch=_tokens_per_epoch(model, samples, config),
        num_processes=process_count(),
        micro_batches=_micro_batches(config),
    )


def layer_bytes(settings: Mapping[str, Any], load: Load, width: int) -> int:
    """Bytes that one decoder layer keeps for its gradient; `width` of a value in its linear maps and attention."""
    hidden, inner, heads = (int(settings[n]) for n in ("hidden_size", "intermediate_size", "num_attention_heads"))
    head = int(settings.get("head_dim") or hidden // heads)
    query, key_value = heads * head, int(settings.get("num_key_value_heads") or heads) * head
    own = load.rows * load.tokens + load.shared
    seen = own + load.rows * load.shared
    norms = own * hidden * (4 * FP32_BYTES + (5 if width == BF16_BYTES else 2) * width)
    if settings["model_type"] == "qwen3":  # it norms queries and keys as well
        norms += own * (query + key_value) * (FP32_BYTES + width)
    return norms + (own * 2 + seen * 2) * query * width + own * 4 * inner * width


def activation_bytes(model: DecoderModel, load: Load, *, bf16: bool, checkpointed: bool) -> int:
    """Estimate of what the forward pass keeps for the gradient, at its peak; see HOW_ACTIVATIONS."""
    own = load.rows * load.tokens + load.shared
    width = BF16_BYTES if bf16 else FP32_BYTES
    layer = layer_bytes(model.spec.decoder, load, width)
    inputs = own * model.hidden_size * FP32_BYTES
    ends = 4 * load.rows * load.tokens * model.hidden_size * FP32_BYTES  # item vectors, dropout, the last norm
    layers = model.num_layers * inputs + layer if checkpointed else model.num_layers * layer
    scores = load.targets * model.num_items * FP32_BYTES * (load.score_matrices + LOGIT_COPIES - 1)
    return layers + ends + scores


def load_of(model: DecoderModel, objective: nn.Module, samples: Samples, config: TrainConfig) -> Load:
    """What the longest micro-batch of a run puts on a device."""
    spec = model.spec
    step = min(config.batch_size, len(samples.lengths))
    rows = -(-step // (process_count() * config.accumulate))
    own_prefix = 0 if spec.shares_prefix else spec.prefix_length
    adapters = {name for name, _ in objective.named_parameters() if "adapters." in name}
    return Load(
        rows=rows,
        tokens=own_prefix + int(samples.lengths.max()) + spec.suffix_length,
        shared=spec.prefix_length - own_prefix,
        targets=rows * int(samples.num_targets.max()),
        score_matrices=1 + len(adapters),
    )


def _parameters(objective: nn.Module) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, value in objective.named_parameters():
        group = next(group for part, group in GROUPS.items() if part in name)
        counts[group] = counts.get(group, 0) + value.numel()
    trainable = sum(value.numel() for value in objective.parameters() if value.requires_grad)
    return counts | {"total": sum(counts.values()), "trainable": trainable}


def _state_bytes(model: DecoderModel, objective: nn.Module, *, bf16: bool) -> dict[str, int]:
    """Weights in fp32 and what goes with each that is trained; a share of them where FSDP cuts them up."""
    shards = process_count() if asked_to_shard() else 1
    total = sum(value.numel() for value in objective.parameters())
    trainable = sum(value.numel() for value in objective.parameters() if value.requires_grad)
    buffers = sum(value.numel() * value.element_size() for value in objective.buffers())
    casts = sum(value.numel() for value in model.decoder.parameters()) * BF16_BYTES if bf16 else 0
    return {
        "weights": total * FP32_BYTES // shards + buffers,
        "bf16_weights": casts,
        "best_weights": trainable * FP32_BYTES // shards,
        "gradients": trainable * FP32_BYTES // shards,
        "adamw_state": trainable * 2 * FP32_BYTES // shards,
    }


def _micro_batches(config: TrainConfig) -> int:
    return min(config.accumulate, -(-config.batch_size // process_count()))


def _tokens_per_epoch(model: DecoderModel, samples: Samples, config: TrainConfig) -> dict[str, int]:
    spec, count = model.spec, len(samples.lengths)
    forwards = -(-count // config.batch_size) * process_count() * _micro_batches(config)
    prefixes = forwards if spec.shares_prefix else count
    items = int(samples.lengths.sum())
    prompt = prefixes * spec.prefix_length + count * spec.suffix_length
    return {"items": items, "prompt": prompt, "total": items + prompt}


def _listed(title: str, values: Mapping[str, int], unit: float) -> str:
    return f"{title}: {', '.join(f'{name} {value / unit:,.3f}' for name, value in values.items())}"

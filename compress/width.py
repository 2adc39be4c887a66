"""Narrower layers: feed-forward channels and heads that take little part are cut off (Minitron, arXiv:2407.14679)."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from compress.calibrate import Statistics
from slmrec.errors import ConfigError
from slmrec.models.decoder import DecoderModel


def require_narrower(model: DecoderModel, mlp_size: int | None, num_heads: int | None) -> None:
    """Refuse widths that the decoder cannot be cut to."""
    settings = model.spec.decoder
    size, heads, group = int(settings["intermediate_size"]), int(settings["num_attention_heads"]), _group(model)
    if mlp_size is not None and mlp_size >= size:
        raise ConfigError(
            f"mlp_size={mlp_size}, but the feed-forward has {size} channels", remedy=f"--mlp-size below {size}"
        )
    if num_heads is not None and (num_heads >= heads or num_heads % group):
        possible = ", ".join(str(count) for count in range(group, heads, group))
        raise ConfigError(
            f"num_heads={num_heads}, but the decoder has {heads} heads, {group} to a key",
            remedy=f"--num-heads {possible or 'left out: there is one group alone'}",
        )


@torch.no_grad()
def cut_width(
    model: DecoderModel, statistics: Mapping[str, Statistics], mlp_size: int | None, num_heads: int | None
) -> DecoderModel:
    """A copy whose layers keep their most active feed-forward channels and heads, each layer its own.

    Args:
        model: it is left as it is.
        statistics: of `calibrate`, over some histories.
        mlp_size: channels that remain; None = all.
        num_heads: query heads that remain; None = all. Heads that share a key go together.
    """
    require_narrower(model, mlp_size, num_heads)
    settings = dict(model.spec.decoder)
    head_dim, group = int(model.decoder.layers[0].self_attn.head_dim), _group(model)
    mlp_size = mlp_size or int(settings["intermediate_size"])
    num_heads = num_heads or int(settings["num_attention_heads"])
    settings |= {
        "intermediate_size": mlp_size, "num_attention_heads": num_heads, "num_key_value_heads": num_heads // group,
        "head_dim": head_dim,
    }  # fmt: skip
    narrower = DecoderModel(replace(model.spec, decoder=settings))
    state = model.state_dict()
    for number in range(model.num_layers):
        name = f"decoder.layers.{number}"
        channels = most_active(statistics[f"layers.{number}.mlp.down"].channel_mean, mlp_size)
        outputs = statistics[f"layers.{number}.self_attn.o"].channel_mean
        keys = most_active(outputs.view(-1, group * head_dim).mean(dim=1), num_heads // group)
        _keep_rows(state, [f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj"], channels)
        _keep_columns(state, f"{name}.mlp.down_proj", channels)
        attention = f"{name}.self_attn"
        _keep_rows(state, [f"{attention}.q_proj"], _spread(keys, group * head_dim))
        _keep_rows(state, [f"{attention}.k_proj", f"{attention}.v_proj"], _spread(keys, head_dim))
        _keep_columns(state, f"{attention}.o_proj", _spread(keys, group * head_dim))
    narrower.load_state_dict(state)
    return narrower.train(model.training)


def most_active(activity: Float[Tensor, " parts"], count: int) -> Int64[Tensor, " kept"]:
    """Numbers of the most active parts, in ascending order.

    >>> most_active(torch.tensor([0.2, 0.9, 0.5]), 2).tolist()
    [1, 2]
    """
    return activity.topk(count).indices.sort().values


def _group(model: DecoderModel) -> int:
    """Query heads that share a key."""
    settings = model.spec.decoder
    return int(settings["num_attention_heads"]) // int(settings["num_key_value_heads"])


def _spread(blocks: Int64[Tensor, " blocks"], size: int) -> Int64[Tensor, " channels"]:
    """Channels of blocks of `size` neighbours."""
    return (blocks[:, None] * size + torch.arange(size)).flatten()


def _keep_rows(state: dict[str, Tensor], names: list[str], rows: Tensor) -> None:
    for name in names:
        for part in (f"{name}.weight", f"{name}.bias"):
            if part in state:
                state[part] = state[part][rows]


def _keep_columns(state: dict[str, Tensor], name: str, columns: Tensor) -> None:
    state[f"{name}.weight"] = state[f"{name}.weight"][:, columns]

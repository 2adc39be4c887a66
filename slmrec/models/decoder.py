"""A pretrained decoder as a recommender: items in as vectors, the user vector out (E4SRec, SLMRec)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from slmrec.config import RecipeConfig
from slmrec.errors import ConfigError
from slmrec.models.prompt import Layout, attended_items, item_positions, suffix_positions

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """Everything but the weights: what `config.json` of a decoder checkpoint holds."""

    decoder: Mapping[str, Any]
    """The transformers config of the decoder, without its vocabulary."""
    recipe: RecipeConfig
    num_items: int
    item_dim: int
    max_history: int
    prefix_length: int
    suffix_length: int
    has_titles: bool
    backbone: str
    share_prefix: bool = True
    title_size: int | None = None
    """Width of a title vector; None = the decoder's."""
    masked_ids: tuple[int, ...] = ()
    """Items that are masked in a history and can be recommended all the same; SLMRec's first one, its padding."""

    @property
    def title_width(self) -> int:
        """Width of a title vector."""
        return self.title_size or int(self.decoder["hidden_size"])

    @property
    def layout(self) -> Layout:
        """Where tokens stand."""
        return Layout(self.prefix_length, self.suffix_length, self.max_history, self.recipe.positions, self.masked_ids)

    @property
    def shares_prefix(self) -> bool:
        """Whether there is an instruction whose keys and values are computed once for all rows."""
        return self.share_prefix and self.prefix_length > 0


def decoder_settings(config: Any, num_layers: int) -> dict[str, Any]:
    """A transformers config cut to its first `num_layers` layers and freed of its vocabulary."""
    settings = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    if settings["model_type"] not in FAMILIES:
        raise ConfigError(
            f"a decoder of the {settings['model_type']} family is not supported", remedy=f"one of {', '.join(FAMILIES)}"
        )
    if num_layers > settings["num_hidden_layers"]:
        raise ConfigError(
            f"{num_layers} layers were asked for, but the decoder has {settings['num_hidden_layers']}",
            remedy=f"--num-layers {settings['num_hidden_layers']} or fewer",
        )
    settings |= {"num_hidden_layers": num_layers, "vocab_size": 1, "tie_word_embeddings": False}
    settings |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    if settings.get("layer_types"):
        settings["layer_types"] = settings["layer_types"][:num_layers]
    rope = settings.get("rope_parameters") or {}  # transformers 5 nests what transformers 4 reads at the top
    if "rope_theta" in rope:
        settings["rope_theta"] = rope["rope_theta"]
    return settings


def build_decoder(settings: Mapping[str, Any]) -> nn.Module:
    """A transformers decoder with random weights and no token embedding."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(**settings)
    decoder = AutoModel.from_config(config, attn_implementation="sdpa")
    decoder.embed_tokens = None
    return decoder  # type: ignore[no-any-return]


class DecoderModel(nn.Module):
    """Item vectors through a decoder; the state after the newest token, normed, is the user vector."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec, self.num_items, self.max_history = spec, spec.num_items, spec.max_history
        self.decoder: Any = build_decoder(spec.decoder)
        hidden = self.hidden_size
        self.item_table = nn.Embedding(spec.num_items + 1, spec.item_dim, padding_idx=0)
        self.item_table.weight.requires_grad_(spec.recipe.item_table == "trainable")
        self.item_proj = nn.Linear(spec.item_dim, hidden)
        self.register_buffer("prefix", torch.zeros(spec.prefix_length, hidden))
        self.register_buffer("suffix", torch.zeros(spec.suffix_length, hidden))
        titles = torch.zeros(spec.num_items + 1, spec.title_width) if spec.has_titles else None
        self.register_buffer("titles", titles)
        self.prefix: Tensor
        self.suffix: Tensor
        self.titles: Tensor | None
        tied = spec.recipe.head == "tied"
        self.user_proj = nn.Linear(hidden, spec.item_dim, bias=False) if tied else None
        self.item_head = None if tied else nn.Linear(hidden, spec.num_items)
        self.title_input = nn.Linear(spec.title_width, hidden, bias=False) if spec.has_titles else None
        self.title_table = nn.Linear(spec.title_width, spec.item_dim, bias=False) if spec.has_titles and tied else None
        self.dropout = nn.Dropout(spec.recipe.dropout)

    @property
    def hidden_size(self) -> int:
        """Width of the decoder."""
        return int(self.spec.decoder["hidden_size"])

    @property
    def num_layers(self) -> int:
        """Depth of the decoder."""
        return int(self.spec.decoder["num_hidden_layers"])

    def checkpoint_gradients(self) -> None:
        """Keep each layer's input alone in training, and compute the layer again for its gradient.

        The instruction must not be shared: a layer computed twice would add to its keys and values twice.
        """
        from transformers.utils import logging

        assert not self.spec.shares_prefix
        logging.set_verbosity_error()  # it misses the token embedding, which no gradient goes through here
        renamed = getattr(self.decoder, "activation_checkpointing_enable", None)  # in transformers 5.23
        (renamed or self.decoder.gradient_checkpointing_enable)({"use_reentrant": False})

    def item_inputs(self, item_ids: Int64[Tensor, "*shape"]) -> Float[Tensor, "*shape hidden"]:
        """What the decoder reads for each item."""
        vectors: Tensor = self.item_proj(self.item_table(item_ids))
        if self.title_input is not None and self.titles is not None:
            vectors = vectors + self.title_input(self.titles[item_ids])
        return vectors

    def item_outputs(self) -> Float[Tensor, "items dim"]:
        """What the projected user vector is compared with: one row per item 1..num_items (tied head)."""
        table = self.item_table.weight[1:]
        if self.title_table is not None and self.titles is not None:
            table = table + self.title_table(self.titles[1:])
        return table

    def forward(self, item_ids: Int64[Tensor, "batch history"]) -> tuple[Float[Tensor, "batch positions hidden"], ...]:
        """States before the first layer and after every layer, at the positions users are read at.

        Entry i + 1 is the state after layer i, the last one after the final norm, as in transformers'
        `hidden_states`. The positions are those of the items or, with a response suffix, the last token alone.
        """
        batch, layout = len(item_ids), self.spec.layout
        vectors = torch.cat([self.dropout(self.item_inputs(item_ids)), self.suffix.expand(batch, -1, -1)], dim=1)
        positions = torch.cat([item_positions(item_ids, layout), suffix_positions(item_ids, layout)], dim=1)
        attended = attended_items(item_ids, layout)
        real = torch.cat([attended, attended.new_ones(batch, layout.suffix_length)], dim=1)
        cache = self._shared_prefix(batch) if self.spec.shares_prefix else None
        jumps = cache is None and layout.prefix_length > 0 and layout.positions == "padded"
        if layout.prefix_length:
            real = torch.cat([real.new_ones(batch, layout.prefix_length), real], dim=1)
            if cache is None:
                own = torch.arange(layout.prefix_length, device=item_ids.device).expand(batch, -1)
                vectors = torch.cat([self.prefix.expand(batch, -1, -1).to(vectors.dtype), vectors], dim=1)
                positions = torch.cat([own, positions], dim=1)
        states = self.decoder(
            inputs_embeds=vectors,
            # without a mask transformers takes a jump in the positions for the start of another sequence
            attention_mask=None if bool(real.all()) and not jumps else real.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=True,
        ).hidden_states
        read = 1 if layout.suffix_length else item_ids.shape[1]
        return tuple(state[:, -read:] for state in states)

    def logits(self, user_vectors: Float[Tensor, "... hidden"]) -> Float[Tensor, "... items"]:
        """Scores of the items 1..num_items, in fp32 whatever the precision of the decoder."""
        with torch.autocast(user_vectors.device.type, enabled=False):
            if self.item_head is not None:
                return self.item_head(user_vectors.float())  # type: ignore[no-any-return]
            assert self.user_proj is not None
            return self.user_proj(user_vectors.float()) @ self.item_outputs().T  # type: ignore[no-any-return]

    def score(self, item_ids: Int64[Tensor, "batch history"]) -> Float[Tensor, "batch items"]:
        """Scores after the newest item of each history."""
        return self.logits(self(item_ids)[-1][:, -1])

    def _shared_prefix(self, batch: int) -> Any:
        """The instruction's keys and values, computed once and seen by every row; gradients add up over rows."""
        cache = self.decoder(inputs_embeds=self.prefix[None], use_cache=True).past_key_values
        for layer in cache.layers:
            layer.keys = layer.keys.expand(batch, -1, -1, -1)
            layer.values = layer.values.expand(batch, -1, -1, -1)
        return cache

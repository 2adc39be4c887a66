"""Settings of every stage: one frozen dataclass each, checked once when it is made."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slmrec.checks import require, require_choice, require_least, require_most, require_seed
from slmrec.choice import Constraints


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How raw logs become a dataset."""

    format: str = "auto"
    """auto, csv, parquet, jsonl, movielens, amazon, recbole or sequences."""
    user_column: str | None = None
    item_column: str | None = None
    time_column: str | None = None
    """Columns by name; None takes the format's own names, or the first known alias in the file."""
    items_file: str | None = None
    """A table of item titles (csv, tsv, parquet, jsonl or RecBole .item); None looks beside the input."""
    item_id_column: str | None = None
    title_column: str | None = None
    """Columns of `items_file`."""
    min_events: int = 0
    """k-core: drop users and items with fewer events, repeatedly; 0 keeps all."""
    max_bad_rows: int = 0
    """Malformed rows tolerated before the run is refused."""

    def __post_init__(self) -> None:
        formats = ("auto", "csv", "parquet", "jsonl", "movielens", "amazon", "recbole", "sequences")
        require_choice("format", self.format, formats)
        require_least(self, min_events=0, max_bad_rows=0)
        named = [name for name in (self.user_column, self.item_column, self.time_column) if name is not None]
        require(
            len(set(named)) == len(named),
            f"one column is asked to be two things: {', '.join(named)}",
            "another --user-column, --item-column or --time-column",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How any model is trained: THE loop's settings."""

    epochs: int
    batch_size: int
    """Training sequences in a step, over all devices and micro-batches."""
    learning_rate: float
    """Peak rate of the decoder (or of the whole model where it has no decoder)."""
    item_learning_rate: float | None = None
    """Peak rate of item table, projections and head; None = `learning_rate`."""
    weight_decay: float = 0.01
    warmup_steps: int = 50
    clip_norm: float = 1.0
    patience: int | None = None
    """Epochs without a better validation NDCG@10 before training stops; None trains all epochs."""
    precision: str = "auto"
    """auto (bfloat16 where the processor computes it, else fp32), bf16 or fp32."""
    accumulate: int = 1
    """Micro-batches that a step's sequences are cut into on each device: less memory, the same gradient."""
    checkpoint_gradients: bool = False
    """Keep no activations inside the decoder's layers, compute them again for the gradient: less memory, a third
    more time."""
    save_every_steps: int = 50
    """Steps between resumable states; an epoch's end is always one."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_least(
            self,
            epochs=1,
            batch_size=1,
            save_every_steps=1,
            accumulate=1,
            warmup_steps=0,
            patience=1,
            weight_decay=0,
        )
        require_seed(self)
        require(
            self.accumulate <= self.batch_size,
            f"a step of batch_size={self.batch_size} cannot be cut into accumulate={self.accumulate} micro-batches",
            f"--accumulate {self.batch_size} or fewer",
        )
        rates = [self.learning_rate] + ([] if self.item_learning_rate is None else [self.item_learning_rate])
        require(self.weight_decay < math.inf, f"weight_decay={self.weight_decay}", "--weight-decay 0.01")
        require(min(rates) > 0, f"a learning rate of {min(rates)} trains nothing", "a rate such as 3e-4")
        require(max(rates) < math.inf, f"a learning rate of {max(rates)} is not finite", "a rate such as 3e-4")
        require(self.clip_norm > 0, f"clip_norm={self.clip_norm} is not above 0", "--clip-norm 1.0")
        require_choice("precision", self.precision, ("auto", "bf16", "fp32"))


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """Which part of a user's sequence a model is trained on and sees."""

    max_history: int = 50
    """Newest items given to the model."""
    max_events: int | None = None
    """Newest training events used of each user, in windows of `max_history`; None = all."""

    def __post_init__(self) -> None:
        require_least(self, max_history=1, max_events=2)
        require(self.max_history <= 4096, f"max_history={self.max_history} is above 4096", "--max-history 50")


@dataclass(frozen=True, kw_only=True)
class SasrecConfig:
    """SASRec (arXiv:1808.09781) trained with cross-entropy over the full catalogue."""

    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 1
    dropout: float = 0.3
    supervision: str = "all"
    """all: every position predicts its successor, in one pass; prefixes: every prefix is a sample of its own, which
    costs more and pays where sequences are short."""
    window: WindowConfig = field(default_factory=WindowConfig)
    train: TrainConfig

    def __post_init__(self) -> None:
        require_least(self, num_layers=1, hidden_size=1)
        require_most(self, num_layers=256, hidden_size=16_384)
        require_choice("supervision", self.supervision, ("all", "prefixes"))
        require(
            self.num_heads >= 1 and self.hidden_size % self.num_heads == 0,
            f"hidden_size={self.hidden_size} cannot be cut into num_heads={self.num_heads} heads",
            "--num-heads 1",
        )
        require(0 <= self.dropout < 1, f"dropout={self.dropout} is no share below 1", "a --dropout in [0, 1)")
        require(
            not self.train.checkpoint_gradients,
            "SASRec is too small for gradient checkpointing",
            "checkpoint_gradients=False, or accumulate=2",
        )


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """What a decoder recommender is made of besides its layers (E4SRec, arXiv:2312.02443; SLMRec)."""

    head: str = "tied"
    """tied: Linear(hidden -> d) and a dot product with the item table; linear: Linear(hidden -> num_items)."""
    prompt: str = "prefix"
    """slmrec: instruction, items, response; prefix: instruction, items; none: items alone."""
    positions: str = "compact"
    """compact: real tokens are counted; padded: item j stands at prefix + (max_history - length) + j."""
    supervision: str = "all"
    """all: every position predicts its successor; prefixes: every prefix is a sample; last: one target."""
    titles: str = "auto"
    """auto: titles give items a vector where the dataset has them; none: ids alone."""
    item_table: str = "trainable"
    """trainable or frozen."""
    dropout: float = 0.2
    """Of the item vectors at the decoder's input, in training."""

    def __post_init__(self) -> None:
        require_choice("head", self.head, ("tied", "linear"))
        require_choice("prompt", self.prompt, ("slmrec", "prefix", "none"))
        require_choice("positions", self.positions, ("compact", "padded"))
        require_choice("supervision", self.supervision, ("all", "prefixes", "last"))
        require_choice("titles", self.titles, ("auto", "none"))
        require_choice("item_table", self.item_table, ("trainable", "frozen"))
        require(0 <= self.dropout < 1, f"dropout={self.dropout} is no share below 1", "a --dropout in [0, 1)")
        if self.supervision == "all":
            require(
                self.prompt != "slmrec",
                "supervision=all reads every item position, but prompt=slmrec reads users after the response tokens",
                "--prompt prefix, or --supervision last or prefixes",
            )
            require(
                self.positions == "compact" or self.prompt == "none",
                "supervision=all trains prefixes at positions that positions=padded never serves them at",
                "--positions compact, or --supervision last or prefixes",
            )


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """An E4SRec-style recommender on the first layers of a pretrained decoder."""

    backbone: str = "smollm2-135m"
    """A named source, a local folder or a Hugging Face hub id of the LLaMA, Mistral, Qwen2 or Qwen3 family."""
    num_layers: int = 8
    tuning: str = "full"
    """full, or lora (r=16, alpha=16, dropout 0.05 on gate/up/down; the base frozen)."""
    share_prefix: bool = True
    """Compute the instruction's keys and values once per step for the whole batch (exact, gradients included)."""
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    window: WindowConfig = field(default_factory=WindowConfig)
    train: TrainConfig

    def __post_init__(self) -> None:
        require_least(self, num_layers=1)
        require_choice("tuning", self.tuning, ("full", "lora"))
        require(
            not (self.train.checkpoint_gradients and self.share_prefix and self.recipe.prompt != "none"),
            "the shared instruction and gradient checkpointing exclude each other",
            "--no-share-prefix, or --prompt none",
        )


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """How a teacher that another program trained is read; what its files do not say."""

    backbone: str
    """The pretrained decoder it was trained on, as in `TeacherConfig`: the prompt's tokens, and 8-bit base weights."""
    num_layers: int | None = None
    """First layers that are kept; None = all the teacher has."""
    part: str = "teacher"
    """teacher or student, of an online distillation run, whose file holds both."""
    lora_alpha: float | None = None
    """None = what adapter_config.json says, else 16."""
    prompt: str = "slmrec"
    positions: str | None = None
    """compact or padded; None = as its code does (SLMRec padded, else compact)."""
    window: WindowConfig | None = None
    """None = its code's newest items (SLMRec 30, else 50)."""
    table_file: str | None = None
    """Item table (.npy, .safetensors, .pkl); None = the one in the folder."""
    items_file: str | None = None
    """Columns row and item_id (csv, parquet, jsonl); None = rows in the order of the items."""

    def __post_init__(self) -> None:
        require_least(self, num_layers=1)
        require_choice("part", self.part, ("teacher", "student"))
        require(
            self.lora_alpha is None or self.lora_alpha > 0,
            f"lora_alpha={self.lora_alpha} is not above 0",
            "--lora-alpha 16",
        )
        require_choice("prompt", self.prompt, ("slmrec", "prefix", "none"))
        require_choice("positions", self.positions or "compact", ("compact", "padded"))


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The serving graph."""

    top_k: int | None = None
    """Items returned; None = min(100, num_items). TensorRT's limit, 3840, holds for every graph."""
    keep_history: bool = False
    """Allow items of the history to be recommended again (repeat consumption)."""
    append: bool | None = None
    """A graph for one new item of a known user as well; None = where positions are compact, which alone allow it."""
    spare_items: float = 0.1
    """Room for items to come, as a share of the catalogue: `update-items` fills it without a new export."""
    opset: int = 20
    fold_prefix: bool = True
    """The instruction's keys and values are constants; else its tokens are computed with every request."""
    newest_only: bool = True
    """The last layer runs for the newest token alone; keys and values aside."""
    fold_items: bool = True
    """Item vectors are multiplied by their projection at export, not with every request."""
    join_projections: bool = True
    """Queries, keys and values are one product where their weights are of one kind."""
    fuse_kernels: bool = True
    """ONNX Runtime's own operations for norms, rotations and 8-bit products; else standard ONNX alone."""
    tune: bool = False
    """Choose the kernel of each 8-bit layer by measurement on this machine."""
    int8_items: bool = False
    """Score items by an 8-bit table first, lists certified to be those of the fp32 one; faster where memory is slow."""
    block_max: bool = True
    """The best items are looked for in the blocks of items with the largest maxima."""

    def __post_init__(self) -> None:
        require(
            self.top_k is None or 1 <= self.top_k <= 3840, f"top_k={self.top_k}, possible are 1 to 3840", "--top-k 100"
        )
        require(
            0 <= self.spare_items <= 10, f"spare_items={self.spare_items} is no share from 0 to 10", "--spare-items 0.1"
        )
        for name in ("tune", "int8_items"):
            require(
                self.fuse_kernels or not getattr(self, name),
                f"{name} needs ONNX Runtime's own operations, which fuse_kernels=False leaves out",
                f"leave out --no-fuse-kernels or --{name.replace('_', '-')}",
            )
        require(18 <= self.opset <= 20, f"opset={self.opset} is not tested", "--opset 20")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """How accuracy and latency of several artefacts are measured in one run."""

    rounds: int = 200
    """Interleaved single-user requests per artefact; percentile p needs at least 1 / (1 - p) of them."""
    batch_sizes: tuple[int, ...] = (8, 32)
    """Batch sizes of the throughput measurement; none measures none."""
    batch_rounds: int = 10
    top_k: int = 10
    accuracy: bool = True
    """Evaluate on all test users as well."""
    rate: float | None = None
    """Requests a second that arrive at random (Poisson) at each artefact in turn; None leaves out that measurement."""
    rate_requests: int = 200
    """Requests of that measurement."""
    gpu_hour_price: float | None = None
    """Price of an hour of the machine, in any currency; turns measured rates into the price of recommendations."""
    floor: bool = True
    """Count what each artefact computes, measure the machine's best, and say how far apart they are (CPUs alone)."""
    device_spec: str | None = None
    """Estimate the floor on another device from its data sheet (a100, h100) instead of measuring this machine's."""
    constraints: Constraints = field(default_factory=Constraints)
    """What the recommended artefact has to keep to."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_least(self, rounds=2, batch_rounds=2, rate_requests=2, top_k=1)
        require_seed(self)
        require(self.rate is None or self.rate > 0, f"rate={self.rate} is not above 0", "--rate 100")
        if self.device_spec is not None:
            require_choice("device_spec", self.device_spec, ("a100", "h100"))
            require(self.floor, "device_spec estimates the floor, which is left out", "without --no-floor")
        for percentile in self.constraints.max_latency_ms:
            needed = round(100 / (100 - int(percentile[1:])))
            require(
                self.rounds >= needed,
                f"{percentile} of {self.rounds} rounds says nothing",
                f"--rounds {needed} or more, or a lower percentile",
            )
        require(
            self.accuracy or self.constraints.min_ndcg is None,
            "min_ndcg needs accuracy, which is not measured",
            "--accuracy, or leave out --min-ndcg",
        )
        price = self.gpu_hour_price
        require(price is None or price > 0, f"gpu_hour_price={price} is not above 0", "--gpu-hour-price 2.50")
        require(
            price is None or bool(self.batch_sizes),
            "a price needs a measured throughput, but batch_sizes is empty",
            "--batch-sizes 8,32",
        )
        require(
            min(self.batch_sizes, default=1) >= 1,
            f"batch_sizes={self.batch_sizes} hold one below 1",
            "--batch-sizes 8,32",
        )


def settings_of(config: Any, *, hashed: Sequence[str] = ()) -> dict[str, Any]:
    """A config as plain JSON values, nested ones included; what a manifest records.

    Fields in `hashed` are files or folders whose content is recorded beside them: of those that exist here the name
    alone is kept, since another spelling of a path is no other setting, and where they lay is nobody's business.
    """
    found = asdict(config)
    for name in hashed:
        if found[name] is not None and Path(found[name]).exists():
            found[name] = Path(found[name]).resolve().name
    return found

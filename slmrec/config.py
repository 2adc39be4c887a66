"""Settings of every stage: one frozen dataclass each, checked once when it is made."""

from dataclasses import asdict, dataclass, field
from typing import Any

from slmrec.errors import ConfigError


def _require(condition: bool, problem: str, remedy: str) -> None:
    if not condition:
        raise ConfigError(problem, remedy=remedy)


def _require_least(settings: object, **least: int) -> None:
    """Refuse a setting below its least value; None is no value."""
    for name, bound in least.items():
        value = getattr(settings, name)
        flag = "--" + name.replace("_", "-")
        _require(value is None or value >= bound, f"{name}={value} is below {bound}", f"{flag} {bound} or more")


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{name}={value!r} is not known", f"one of {', '.join(choices)}")


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
        _require_choice("format", self.format, formats)
        _require_least(self, min_events=0, max_bad_rows=0)


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
        _require_least(self, epochs=1, batch_size=1, save_every_steps=1, accumulate=1, warmup_steps=0, patience=0)
        _require(
            self.accumulate <= self.batch_size,
            f"a step of batch_size={self.batch_size} cannot be cut into accumulate={self.accumulate} micro-batches",
            f"--accumulate {self.batch_size} or fewer",
        )
        rates = [self.learning_rate] + ([] if self.item_learning_rate is None else [self.item_learning_rate])
        _require(min(rates) > 0, f"a learning rate of {min(rates)} trains nothing", "a rate such as 3e-4")
        _require(self.clip_norm > 0, f"clip_norm={self.clip_norm} is not above 0", "--clip-norm 1.0")
        _require_choice("precision", self.precision, ("auto", "bf16", "fp32"))


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """Which part of a user's sequence a model is trained on and sees."""

    max_history: int = 50
    """Newest items given to the model."""
    max_events: int | None = None
    """Newest training events used of each user, in windows of `max_history`; None = all."""

    def __post_init__(self) -> None:
        _require_least(self, max_history=1, max_events=2)
        _require(self.max_history <= 4096, f"max_history={self.max_history} is above 4096", "--max-history 50")


@dataclass(frozen=True, kw_only=True)
class SasrecConfig:
    """SASRec (arXiv:1808.09781) trained with cross-entropy over the full catalogue."""

    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 1
    dropout: float = 0.3
    window: WindowConfig = field(default_factory=WindowConfig)
    train: TrainConfig

    def __post_init__(self) -> None:
        _require_least(self, num_layers=1)
        _require(
            self.num_heads >= 1 and self.hidden_size % self.num_heads == 0,
            f"hidden_size={self.hidden_size} cannot be cut into num_heads={self.num_heads} heads",
            "--num-heads 1",
        )
        _require(0 <= self.dropout < 1, f"dropout={self.dropout} is no share below 1", "a --dropout in [0, 1)")
        _require(
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
        _require_choice("head", self.head, ("tied", "linear"))
        _require_choice("prompt", self.prompt, ("slmrec", "prefix", "none"))
        _require_choice("positions", self.positions, ("compact", "padded"))
        _require_choice("supervision", self.supervision, ("all", "prefixes", "last"))
        _require_choice("titles", self.titles, ("auto", "none"))
        _require_choice("item_table", self.item_table, ("trainable", "frozen"))
        _require(0 <= self.dropout < 1, f"dropout={self.dropout} is no share below 1", "a --dropout in [0, 1)")
        if self.supervision == "all":
            _require(
                self.prompt != "slmrec",
                "supervision=all reads every item position, but prompt=slmrec reads users after the response tokens",
                "--prompt prefix, or --supervision last or prefixes",
            )
            _require(
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
        _require_least(self, num_layers=1)
        _require_choice("tuning", self.tuning, ("full", "lora"))
        _require(
            not (self.train.checkpoint_gradients and self.share_prefix and self.recipe.prompt != "none"),
            "the shared instruction and gradient checkpointing exclude each other",
            "--no-share-prefix, or --prompt none",
        )


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How a student is distilled from its teacher (SLMRec, arXiv:2405.17890, eq. 6)."""

    num_layers: int = 4
    """Decoder layers of the student."""
    num_blocks: int = 4
    """Blocks both models are cut into; features are matched at each block's last layer."""
    init: str = "teacher"
    """teacher: evenly spaced layers of the teacher; backbone: first layers of the pretrained decoder."""
    direction_weight: float = 1.0
    """Weight of the cosine term, lambda_1."""
    magnitude_weight: float = 0.1
    """Weight of the squared distance, lambda_2."""
    supervision_weight: float = 0.1
    """Weight of the multiple-supervision term, lambda_3."""
    magnitude_scale: str = "hidden"
    """hidden: the squared distance is divided by the teacher's mean squared norm; none: the paper's."""
    share_prefix: bool = True
    """Compute the instruction once per step where the teacher does."""
    train: TrainConfig

    def __post_init__(self) -> None:
        _require_least(self, num_layers=1)
        _require(
            1 <= self.num_blocks <= self.num_layers,
            f"num_layers={self.num_layers} cannot be cut into num_blocks={self.num_blocks} blocks",
            f"--num-blocks between 1 and {self.num_layers}",
        )
        _require_choice("init", self.init, ("teacher", "backbone"))
        _require_choice("magnitude_scale", self.magnitude_scale, ("hidden", "none"))
        weights = (self.direction_weight, self.magnitude_weight, self.supervision_weight)
        _require(min(weights) >= 0, f"a loss weight of {min(weights)} is negative", "weights of 0 or more")
        _require(
            self.supervision_weight == 0 or self.num_blocks >= 2,
            "multiple supervision needs a block before the last, but num_blocks=1",
            "--num-blocks 2 or more, or --supervision-weight 0",
        )


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """8-bit weights per output channel, 8-bit activations per token."""

    bits: int = 8
    accuracy_gate: float = 0.99
    """Least NDCG@10 on validation users, as a fraction of the fp32 parent's."""
    keep_fp: tuple[str, ...] = ()
    """Glob patterns of linear layers that stay fp32, such as layers.3.mlp.down_proj."""
    auto_keep: bool = False
    """Keep the layers with the largest 8-bit error in fp32 until the gate holds."""

    def __post_init__(self) -> None:
        _require(
            self.bits == 8,
            f"bits={self.bits} is not supported: no measured runtime gains from fewer bits at these sizes",
            "--bits 8",
        )
        _require(0 < self.accuracy_gate <= 1, f"accuracy_gate={self.accuracy_gate} is no share", "--accuracy-gate 0.99")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The serving graph."""

    top_k: int | None = None
    """Items returned; None = min(100, num_items). TensorRT's limit, 3840, holds for every graph."""
    keep_history: bool = False
    """Allow items of the history to be recommended again (repeat consumption)."""
    opset: int = 20

    def __post_init__(self) -> None:
        _require(
            self.top_k is None or 1 <= self.top_k <= 3840, f"top_k={self.top_k}, possible are 1 to 3840", "--top-k 100"
        )
        _require(18 <= self.opset <= 20, f"opset={self.opset} is not tested", "--opset 20")


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
    seed: int = 0

    def __post_init__(self) -> None:
        _require_least(self, rounds=2, batch_rounds=2)
        _require(
            min(self.batch_sizes, default=1) >= 1,
            f"batch_sizes={self.batch_sizes} hold one below 1",
            "--batch-sizes 8,32",
        )


def settings_of(config: Any) -> dict[str, Any]:
    """A config as plain JSON values, nested ones included; what a manifest records."""
    return asdict(config)

"""Settings of distillation and quantization, as `slmrec.config` has those of the other stages."""

import math
from dataclasses import dataclass, field

from slmrec.checks import require, require_choice, require_least, require_seed
from slmrec.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Where the features of a frozen teacher come from."""

    source: str = "stored"
    """stored: computed once, before training; live: by the teacher at every step, as the published code does."""
    dtype: str = "bfloat16"
    """bfloat16 or float32, of what is stored."""
    keep: bool = False
    """Leave the store beside the output, for further students of the same teacher."""

    def __post_init__(self) -> None:
        require_choice("source", self.source, ("stored", "live"))
        require_choice("dtype", self.dtype, ("bfloat16", "float32"))
        require(
            self.source == "stored" or (self.dtype == "bfloat16" and not self.keep),
            "features that the teacher gives at every step are not stored",
            "--features stored, or neither --feature-dtype nor --keep-features",
        )


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """Teacher and student trained together (SLMRec, section 3.3)."""

    signal: str = "features"
    """features: direction and magnitude; logits: KL divergence of the adapters' logits, block by block."""
    teacher_gradient: bool = False
    """Whether the feature terms move the teacher too."""

    def __post_init__(self) -> None:
        require_choice("signal", self.signal, ("features", "logits"))
        require(
            not (self.teacher_gradient and self.signal == "logits"),
            "logits of the teacher are detached, so no gradient can reach it through them",
            "--no-teacher-gradient, or --signal features",
        )


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How a student is distilled from its teacher (SLMRec, arXiv:2405.17890, eq. 6)."""

    num_layers: int = 4
    """Decoder layers of the student."""
    hidden_size: int | None = None
    """Width of the student's decoder; None = the teacher's."""
    num_blocks: int = 4
    """Blocks both models are cut into; features are matched at each block's last layer."""
    init: str = "teacher"
    """teacher: evenly spaced layers of the teacher; teacher-first: its first layers; backbone: first layers of the
    pretrained decoder; random: none."""
    item_table: str = "trainable"
    """trainable: the student goes on training the teacher's item table; frozen: it shares it as it is."""
    loss: str = "paper"
    """paper: terms are means over blocks and distances are squared; repo: they are sums and distances are not."""
    direction_weight: float = 1.0
    """Weight of the cosine term, lambda_1."""
    magnitude_weight: float = 0.1
    """Weight of the distance, lambda_2."""
    supervision_weight: float = 0.1
    """Weight of the multiple-supervision term, lambda_3."""
    list_weight: float = 0.0
    """Weight of the divergence from the teacher's scores of its best items; 0 = off, as in the paper."""
    list_size: int = 50
    """Best items of the teacher that the list term compares."""
    magnitude_scale: str = "hidden"
    """hidden: distances are relative to the teacher's mean norm; none: the paper's."""
    share_prefix: bool = True
    """Compute the instruction once per step where the teacher does."""
    features: FeatureConfig = field(default_factory=FeatureConfig)
    online: OnlineConfig | None = None
    """Train the teacher as well, at the same time; None keeps it frozen."""
    train: TrainConfig

    def __post_init__(self) -> None:
        require_least(self, num_layers=1, hidden_size=1, list_size=2)
        require(
            1 <= self.num_blocks <= self.num_layers,
            f"num_layers={self.num_layers} cannot be cut into num_blocks={self.num_blocks} blocks",
            self._fewer_blocks(),
        )
        require_choice("init", self.init, ("teacher", "teacher-first", "backbone", "random"))
        require_choice("item_table", self.item_table, ("trainable", "frozen"))
        require_choice("loss", self.loss, ("paper", "repo"))
        require_choice("magnitude_scale", self.magnitude_scale, ("hidden", "none"))
        for name in ("direction_weight", "magnitude_weight", "supervision_weight", "list_weight"):
            weight = getattr(self, name)
            flag = f"--{name.replace('_', '-')}"
            require(0 <= weight < math.inf, f"{name}={weight} is no finite number of 0 or more", f"{flag} 0.1")
        require(
            self.supervision_weight == 0 or self.num_blocks >= 2,
            "multiple supervision needs a block before the last, but num_blocks=1",
            "--supervision-weight 0" + (", or --num-blocks 2 or more" if self.num_layers > 1 else ""),
        )
        self._check_online()

    def _fewer_blocks(self) -> str:
        if self.num_layers > 1:
            return f"--num-blocks between 1 and {self.num_layers}"
        return "--num-blocks 1 --supervision-weight 0" if self.supervision_weight else "--num-blocks 1"

    def _check_online(self) -> None:
        if self.online is None:
            return
        require(
            self.list_weight == 0,
            "the list term reads stored scores of a frozen teacher, which online distillation does not have",
            "--list-weight 0, or leave out --online",
        )
        require(
            self.online.signal == "features" or self.supervision_weight > 0,
            "online logits are those of the multiple-supervision adapters, but supervision_weight=0",
            "--supervision-weight above 0, or --signal features",
        )
        if self.online.signal == "logits":
            require(
                self.direction_weight == self.magnitude_weight == 0,
                f"online logits compare no features, but direction_weight={self.direction_weight} and "
                f"magnitude_weight={self.magnitude_weight}",
                "--direction-weight 0 --magnitude-weight 0, or --signal features",
            )
        else:
            require(
                self.matches_features,
                "nothing follows the teacher: the signal is features, but direction_weight and magnitude_weight are 0",
                "leave out --online for cross-entropy alone, or --signal logits",
            )
        require(
            self.features == FeatureConfig(),
            "online, features are those of the step: none are stored",
            "leave out --features, --feature-dtype and --keep-features, or leave out --online",
        )

    @property
    def matches_features(self) -> bool:
        """Whether any term compares features of student and teacher."""
        by_signal = self.online is None or self.online.signal == "features"
        return by_signal and (self.direction_weight > 0 or self.magnitude_weight > 0)


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """What of the data outliers and static ranges are found on: histories of validation users."""

    histories: int = 512
    """Drawn at random; all where there are fewer."""
    migrate: bool = True
    """Move outliers of activations into the weights (SmoothQuant, arXiv:2211.10438); exact in fp32."""
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            self.histories >= 1,
            f"calibration_histories={self.histories} leaves nothing to calibrate on",
            "--calibration-histories 512",
        )
        require_seed(self)


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """8-bit weights per output channel, 8-bit activations per token."""

    bits: int = 8
    backend: str = "neutral"
    """neutral: layers any backend can run; bitsandbytes: LLM.int8 (arXiv:2208.07339), for PyTorch alone."""
    accuracy_gate: float = 0.99
    """Least NDCG@10 on validation users, as a fraction of the fp32 parent's."""
    keep_fp: tuple[str, ...] = ()
    """Glob patterns of linear layers that stay fp32, such as layers.3.mlp.down_proj or layers.3.mlp.down."""
    auto_keep: bool = False
    """Keep the most sensitive layers in fp32 until the gate holds."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)

    def __post_init__(self) -> None:
        require(
            self.bits == 8,
            f"bits={self.bits} is not supported: 8 are what ONNX Runtime, TensorRT and LLM.int8 compute with by whole "
            "layers; fewer were not built, and 16 are a precision of engines (export --trt --precision fp16)",
            "--bits 8",
        )
        require_choice("backend", self.backend, ("neutral", "bitsandbytes"))
        require(
            self.backend == "neutral" or self.calibration == CalibrationConfig(seed=self.calibration.seed),
            "LLM.int8 is not calibrated: it finds outliers in every batch anew",
            "--backend neutral, or leave out --calibration-histories and --no-migrate",
        )
        require(
            0 < self.accuracy_gate <= 1,
            f"accuracy_gate={self.accuracy_gate} is no share above 0 and at most 1",
            "--accuracy-gate 0.99",
        )


@dataclass(frozen=True, kw_only=True)
class SensitivityConfig:
    """How the layers' sensitivity to 8 bits is measured."""

    max_users: int = 2000
    """Validation users that are asked, drawn at random; all where there are fewer."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)

    def __post_init__(self) -> None:
        require_least(self, max_users=1)


@dataclass(frozen=True, kw_only=True)
class ImportanceConfig:
    """How much each layer of a decoder matters."""

    max_users: int = 2000
    """Validation users that are asked, drawn at random; all where there are fewer."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_least(self, max_users=1)
        require_seed(self)


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Which layers, heads and feed-forward channels a smaller decoder is left without, and how it is healed."""

    num_layers: int | None = None
    """Layers that remain; None = all but `drop`."""
    drop: tuple[int, ...] = ()
    """Layers to drop by number, from 0."""
    criterion: str = "damage"
    """damage: loss of validation NDCG@10 without the layer; angular: distance of the user vectors before and after
    (arXiv:2403.17887); influence: 1 - cosine of a layer's input and output (ShortGPT, arXiv:2403.03853)."""
    contiguous: bool = False
    """Drop neighbouring layers alone."""
    mlp_size: int | None = None
    """Feed-forward channels that remain in each layer, by mean activation (Minitron, arXiv:2407.14679)."""
    num_heads: int | None = None
    """Query heads that remain in each layer, likewise; with grouped attention a group goes with its key."""
    heal_epochs: int = 1
    """Epochs of distillation from the unpruned model; 0 leaves the rest as it is."""
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    train: TrainConfig
    """Of the healing; its epochs are `heal_epochs` where these are not 0."""

    def __post_init__(self) -> None:
        require_choice("criterion", self.criterion, ("damage", "angular", "influence"))
        require_least(self, num_layers=1, mlp_size=1, num_heads=1, heal_epochs=0)
        require(
            self.num_layers is None or not self.drop,
            "--num-layers and --drop both say which layers go",
            "one of the two",
        )
        wanted = (self.num_layers, self.mlp_size, self.num_heads)
        require(
            bool(self.drop) or any(one is not None for one in wanted),
            "nothing is to be pruned",
            "--num-layers 3, --drop 2,5, --mlp-size 1024 or --num-heads 6",
        )
        require(len(set(self.drop)) == len(self.drop), f"--drop {self.drop} names a layer twice", "each layer once")
        require(
            self.num_layers is not None or (self.criterion == "damage" and not self.contiguous),
            "--criterion and --contiguous choose layers, but none are to be chosen",
            "--num-layers with them",
        )

"""Settings of TensorRT engines, as `slmrec.config` has those of the other stages."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slmrec.checks import require, require_choice
from slmrec.errors import ConfigError

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
FLAVORS = ("auto", "tensorrt", "rtx")
RANGES = ("max", "percentile", "entropy")
HARDWARE = ("none", "ampere_plus", "same_compute_capability")
FP8_SINCE, LARGEST_INDEX = (8, 9), 2**31 - 1

Shapes = Mapping[str, tuple[int, ...]]
"""Input name -> its shape."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a TensorRT engine is built from a serving graph."""

    precision: str | None = None
    """Of the decoder's products; None = int8 for an 8-bit checkpoint, else fp16. Norms, softmax, item scores and top-K
    are fp32 at every precision."""
    ranges: str = "percentile"
    """Which of the calibrated ranges of activations int8 and fp8 scales cover: max, percentile (99.99 %), entropy."""
    flavor: str = "auto"
    """tensorrt; rtx (TensorRT-RTX, builds without a GPU); auto = tensorrt where it can build, and never rtx."""
    min_shapes: str | None = None
    """As trtexec spells them: item_ids:1x1,exclude_ids:1x0. None = from the data, as for the other two."""
    opt_shapes: str | None = None
    max_shapes: str | None = None
    workspace: int | None = None
    """MiB of scratch memory that the build may use; None = the device's."""
    timing_cache: str | None = None
    """File of kernel timings, read before and written after a build."""
    hardware_compat: str = "none"
    """none; ampere_plus or same_compute_capability: the engine runs on those devices too, with fewer kernels."""
    version_compatible: bool = False
    """The engine runs with later TensorRT versions of the same major number."""
    compute_capability: tuple[str, ...] = ()
    """Devices to build for, such as 8.0, one plan each; none = the GPU that is here, by rtx all that it supports."""
    accuracy_gate: float = 0.99
    """Least NDCG@10 on validation users, as a fraction of the checkpoint's, that the graph as placed must keep."""

    def __post_init__(self) -> None:
        if self.precision is not None:
            require_choice("precision", self.precision, PRECISIONS)
        require_choice("ranges", self.ranges, RANGES)
        require_choice("flavor", self.flavor, FLAVORS)
        require_choice("hardware_compat", self.hardware_compat, HARDWARE)
        require(self.workspace is None or self.workspace >= 1, f"workspace={self.workspace} MiB", "--workspace 4096")
        require(0 < self.accuracy_gate <= 1, f"accuracy_gate={self.accuracy_gate} is no share", "--accuracy-gate 0.99")
        for one in self.compute_capability:
            require(
                re.fullmatch(r"\d{1,2}\.\d", one) is not None,
                f"compute_capability={one!r} is none",
                "--compute-capability 8.0,8.9",
            )
        self._require_ascending()
        require(
            self.timing_cache is None or self.flavor != "rtx",
            "TensorRT-RTX keeps no kernel timings",
            "leave out --timing-cache, or --trt-flavor tensorrt",
        )
        require(
            self.timing_cache is None or Path(self.timing_cache).parent.is_dir(),
            f"the folder of timing_cache={self.timing_cache} does not exist",
            "--timing-cache FILE in a folder that is there",
        )
        if self.precision == "fp8":
            self.require_fp8()

    def _require_ascending(self) -> None:
        """Refuse shapes out of order before a graph is made; `profile_of` judges them with what was not asked for."""
        largest: dict[str, tuple[int, ...]] = {}
        for name in ("min_shapes", "opt_shapes", "max_shapes"):
            flag = f"--{name.replace('_', '-')}"
            for tensor, shape in parse_shapes(getattr(self, name) or "", flag).items():
                least = largest.get(tensor, (0, 0))
                require(
                    all(size >= before for size, before in zip(shape, least, strict=True)),
                    f"{flag} has {tensor}:{shape[0]}x{shape[1]}, below the {least[0]}x{least[1]} before it",
                    "--min-shapes, --opt-shapes and --max-shapes in ascending order",
                )
                largest[tensor] = shape

    def require_fp8(self) -> None:
        """Refuse fp8 for devices without it.

        Raises:
            ConfigError: one of the compute capabilities is below 8.9.
        """
        for one in self.compute_capability:
            major, minor = (int(part) for part in one.split("."))
            require(
                (major, minor) >= FP8_SINCE,
                f"fp8 on compute capability {one}: devices before 8.9 have no 8-bit floating point",
                "--precision int8, or --compute-capability 8.9",
            )


def parse_shapes(text: str, flag: str) -> dict[str, tuple[int, ...]]:
    """Shapes in trtexec's spelling.

    >>> parse_shapes("item_ids:8x32,exclude_ids:8x0", "--opt-shapes")
    {'item_ids': (8, 32), 'exclude_ids': (8, 0)}
    """
    found: dict[str, tuple[int, ...]] = {}
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"(item_ids|exclude_ids):(\d+)x(\d+)", part.strip())
        if match is None:
            raise ConfigError(
                f"{flag} has {part!r}; the inputs are item_ids and exclude_ids, each batch x width",
                remedy=f"{flag} item_ids:8x32,exclude_ids:8x64",
            )
        found[match[1]] = (int(match[2]), int(match[3]))
    return found


def _within(defaults: Shapes, asked: Mapping[str, Shapes]) -> dict[str, tuple[int, ...]]:
    """Defaults moved into the range of what was asked for: who caps the largest batch need not say the usual one."""
    found = {}
    for name, shape in defaults.items():
        low = asked["min"].get(name, (0, 0))
        high = asked["max"].get(name, (LARGEST_INDEX, LARGEST_INDEX))
        found[name] = tuple(min(max(size, least), most) for size, least, most in zip(shape, low, high, strict=True))
    return found


def profile_of(
    config: EngineConfig, defaults: Mapping[str, Shapes], rows: int, max_history: int | None = None
) -> dict[str, list[list[int]]]:
    """Smallest, usual and largest shape of each input.

    Args:
        config: what was asked for.
        defaults: "min", "opt", "max" -> shapes, for what was not.
        rows: of the item table, padding and spare ones included.
        max_history: the window of the graph; wider histories have no positions.

    Raises:
        ConfigError: shapes out of order, batches that differ between inputs, or a batch whose scores are more numbers
            than TensorRT can index.
    """
    asked = {kind: parse_shapes(getattr(config, f"{kind}_shapes") or "", kind) for kind in ("min", "opt", "max")}
    chosen = {kind: {**_within(defaults[kind], asked), **asked[kind]} for kind in asked}
    for kind, shapes in chosen.items():
        batches = {name: shape[0] for name, shape in shapes.items()}
        flag = next((f"--{one}-shapes" for one in (kind, "max", "min") if asked[one]), f"--{kind}-shapes")
        require(
            len(set(batches.values())) == 1,
            f"{flag} leads to batches of {' and '.join(f'{size} ({name})' for name, size in batches.items())}",
            f"name both inputs: {flag} item_ids:8x50,exclude_ids:8x320",
        )
    profile = {name: [list(chosen[kind][name]) for kind in ("min", "opt", "max")] for name in defaults["min"]}
    for name, (least, usual, most) in profile.items():
        for axis, what in enumerate(("batch", "width")):
            require(
                least[axis] <= usual[axis] <= most[axis],
                f"{what} of {name}: min {least[axis]}, opt {usual[axis]}, max {most[axis]} are out of order",
                f"--min-shapes {name}:1x1 ... in ascending order",
            )
        require(least[0] >= 1, f"--min-shapes has a batch of {least[0]}", "a batch of 1 or more")
    require(profile["item_ids"][0][1] >= 1, "--min-shapes has item_ids of width 0", "a width of 1 or more")
    widest = profile["item_ids"][2][1]
    require(
        max_history is None or widest <= max_history,
        f"--max-shapes has item_ids of width {widest}, and the graph's window is {max_history}",
        f"a width of at most {max_history}",
    )
    require(
        profile["exclude_ids"][2][1] >= 1, "--max-shapes lets no item be excluded", "exclude_ids of width 32 or more"
    )
    largest = profile["item_ids"][2][0]
    require(
        largest * rows <= LARGEST_INDEX,
        f"a batch of {largest} times {rows} items are more scores than TensorRT can index ({LARGEST_INDEX})",
        f"--max-shapes with a batch of at most {LARGEST_INDEX // rows}",
    )
    return profile

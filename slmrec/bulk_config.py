"""Settings of `slmcompress recommend` where its output is a folder of shards."""

from dataclasses import dataclass

from slmrec.checks import require, require_choice, require_least

ENGINES = ("local", "ray")


@dataclass(frozen=True, kw_only=True)
class BulkConfig:
    """How many users are answered at once, and by what."""

    top_k: int = 10
    engine: str = "local"
    """local: this process; ray: workers of Ray Data, here or on the cluster that RAY_ADDRESS names."""
    shard_users: int = 16_384
    """Of one output file at most: what is lost when a worker dies."""
    workers: int | None = None
    """Of Ray; None = one for each core, or GPU with --device cuda."""

    def __post_init__(self) -> None:
        require_choice("engine", self.engine, ENGINES)
        require(self.top_k >= 1, f"top_k={self.top_k} is below 1", "-k 10")
        require_least(self, shard_users=1, workers=1)
        require(
            self.workers is None or self.engine == "ray",
            f"workers={self.workers}, but the engine {self.engine} is one process",
            "--engine ray --workers 2",
        )

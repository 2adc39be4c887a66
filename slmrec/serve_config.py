"""Settings of `slmcompress serve`."""

from dataclasses import dataclass

from slmrec.checks import require, require_least, require_most

LONGEST_S = 86_400
"""A day: nobody waits longer for an answer or for a look at a folder."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What a server takes on, and what it refuses."""

    host: str = "127.0.0.1"
    """Loopback unless told otherwise: there is no encryption here."""
    port: int = 8000
    max_batch: int = 64
    """Users that are computed together at most; those that wait meanwhile are the next batch."""
    max_queue: int = 1024
    """Users that may wait; further requests are answered 429 at once."""
    timeout_s: float = 5.0
    """Longest wait for an answer; then 504, and the request is not computed if it has not begun."""
    max_body_bytes: int = 4 * 2**20
    """Of a request; compressed bodies are refused, so nothing grows when it is read."""
    max_ids: int = 10_000
    """Of a history, of exclusions or of an allow-list of one user."""
    state_mb: float = 0.0
    """Memory for keys and values of users who may come back; 0 = none, every history is computed whole."""
    threads: int = 0
    """Of ONNX Runtime for a batch; 0 = the cores that the process may use."""
    watch_s: float = 0.0
    """Seconds between looks at the bundle's folder for another bundle; 0 = SIGHUP alone."""

    def __post_init__(self) -> None:
        require_least(self, max_batch=1, max_queue=1, max_body_bytes=1024, max_ids=1, threads=0)
        require_most(self, threads=1024)
        require(0 <= self.port <= 65535, f"port={self.port}, expected is 0 to 65535", "--port 8000")
        timeout, state, watch = (f"{name}={getattr(self, name)}" for name in ("timeout_s", "state_mb", "watch_s"))
        require(0 < self.timeout_s <= LONGEST_S, f"{timeout}, expected is above 0, to {LONGEST_S}", "--timeout-s 5")
        require(0 <= self.state_mb <= 1e7, f"{state}, expected is 0 to 10,000,000", "--state-mb 256")
        require(0 <= self.watch_s <= LONGEST_S, f"{watch}, expected is 0 to {LONGEST_S}", "--watch-s 2")
        require(
            self.max_queue >= self.max_batch,
            f"max_queue={self.max_queue} holds less than a batch of {self.max_batch}",
            "--max-queue 1024",
        )

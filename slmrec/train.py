"""THE training loop: any objective, resumable to the bit, early stopping on validation NDCG@10."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor, nn

from slmrec.config import TrainConfig
from slmrec.errors import TrainingError
from slmrec.progress import Bar, progress_bar
from slmrec.sequences import length_batches
from slmrec.writing import save_tensors

LOG_EVERY_STEPS = 10
STATE_FILE = "state.safetensors"


class Batch(NamedTuple):
    """One step's input."""

    item_ids: Tensor
    """int64 [batch, history], left-padded with 0."""
    targets: Tensor
    """int64 [batch, positions]; 0 where a position has no target."""
    features: Tensor | None = None
    """Teacher features at the targets where they can be compared, [feature targets, blocks, hidden]."""
    best: Tensor | None = None
    """The teacher's best items at each target, int32 [targets, list], internal ids."""
    best_scores: Tensor | None = None
    """Their scores, [targets, list]."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        moved = {name: part.to(device) for name, part in self._asdict().items() if part is not None}
        return self._replace(**moved)


class Objective(Protocol):
    """An nn.Module whose forward gives the loss, term by term."""

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Weighted terms by name; their sum is minimised."""
        ...


@dataclass(kw_only=True)
class Task:
    """What is trained, on what, and how it is judged."""

    title: str
    objective: nn.Module
    lengths: np.ndarray
    """Length of each sample; batches hold samples of like length."""
    batch: Callable[[np.ndarray], Batch]
    """Sample numbers -> one step's input, on the CPU."""
    validate: Callable[[], float]
    """NDCG@10 on validation users, of the model as it is now."""
    item_parameters: Sequence[str] = ()
    """Prefixes of parameter names that learn at `item_learning_rate`."""


@dataclass
class Progress:
    """Where a run is: all that changes from step to step besides tensors."""

    step: int = 0
    best_metric: float = -1.0
    best_epoch: int = -1
    finished: bool = False
    log: list[dict[str, Any]] = field(default_factory=list)


def train(task: Task, config: TrainConfig, work: Path, key: str, device: torch.device) -> Progress:
    """Minimise the objective; afterwards it holds the weights of the best epoch.

    The state of the run lies in `work` and is used again when `key` matches. Data order and dropout are functions
    of seed and step, so a resumed run equals an uninterrupted one bit by bit on the same machine.

    Raises:
        TrainingError: the loss or its gradient is no longer finite.
    """
    run = _Run(task, config, work, key, device)
    steps = run.steps_per_epoch * config.epochs
    with progress_bar(task.title, steps, done=run.progress.step) as bar:
        while run.progress.step < steps and not run.progress.finished:
            run.epoch(bar)
    run.load_best()
    return run.progress


class _Run:
    def __init__(self, task: Task, config: TrainConfig, work: Path, key: str, device: torch.device) -> None:
        self.task, self.config, self.device = task, config, device
        self.state_path, self.key = work / STATE_FILE, key
        torch.manual_seed(config.seed)
        self.accelerator = Accelerator(cpu=device.type == "cpu")
        self.optimizer = torch.optim.AdamW(_parameter_groups(task, config), fused=True)
        self.objective, self.optimizer = self.accelerator.prepare(task.objective.to(device), self.optimizer)
        self.parameters = {n: p for n, p in task.objective.named_parameters() if p.requires_grad}
        self.best = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.steps_per_epoch = -(-len(task.lengths) // config.batch_size)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.bf16 = config.precision == "bf16" or (config.precision == "auto" and computes_bfloat16(device))
        self.pending: list[dict[str, float]] = []
        self.progress = self._resume()

    def epoch(self, bar: Bar) -> None:
        """Train what is left of the current epoch, then validate."""
        epoch, first = divmod(self.progress.step, self.steps_per_epoch)
        seed = self.config.seed * 1_000_003 + epoch
        batches = list(length_batches(self.task.lengths, self.config.batch_size, seed=seed))
        self.task.objective.train()
        for rows in batches[first:]:
            self._step(rows)
            bar(1, self._note())
            at_end = self.progress.step % self.steps_per_epoch == 0
            if self.progress.step % self.config.save_every_steps == 0 and not at_end:
                self._save()
        self._validate(epoch)
        self._save()
        bar(0, self._note())

    def load_best(self) -> None:
        """Put the best epoch's weights into the objective."""
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(self.best[name])

    def _step(self, rows: np.ndarray) -> None:
        step = self.progress.step
        torch.manual_seed(self.config.seed * 2_000_003 + step)  # dropout: a function of the step, not of the past
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self._schedule(step)
        batch = self.task.batch(rows).to(self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            terms = self.objective(batch)
        loss = torch.stack(list(terms.values())).sum()
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.parameters.values(), self.config.clip_norm)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise TrainingError(
                f"{self.task.title}: the loss is {loss.item()} and its gradient norm {float(norm)} at step {step}",
                remedy="a smaller --learning-rate, more --warmup-steps, or --precision fp32",
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self._log({"loss": loss.item(), "gradient_norm": float(norm)} | {n: t.item() for n, t in terms.items()})

    def _log(self, record: dict[str, float]) -> None:
        self.pending.append(record)
        step = self.progress.step
        if step % LOG_EVERY_STEPS == 0 or step % self.steps_per_epoch == 0:
            means = {name: float(np.mean([record[name] for record in self.pending])) for name in record}
            self.progress.log.append({"step": step, "epoch": (step - 1) // self.steps_per_epoch} | means)
            self.pending = []

    def _validate(self, epoch: int) -> None:
        metric = self.task.validate()
        progress = self.progress
        progress.log.append({"step": progress.step, "epoch": epoch, "validation_ndcg@10": metric})
        if metric > progress.best_metric:
            progress.best_metric, progress.best_epoch = metric, epoch
            self.best = {name: value.detach().clone() for name, value in self.parameters.items()}
        patience = self.config.patience
        progress.finished = patience is not None and epoch - progress.best_epoch >= patience

    def _schedule(self, step: int) -> float:
        """Linear warm-up, then a cosine to zero."""
        total = self.steps_per_epoch * self.config.epochs
        warmup = min(self.config.warmup_steps, total // 2)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return float(0.5 * (1 + np.cos(np.pi * (step - warmup) / max(1, total - warmup))))

    def _note(self) -> str:
        losses = [record["loss"] for record in [*self.progress.log, *self.pending] if "loss" in record]
        best = f"  NDCG@10 {self.progress.best_metric:.4f}" if self.progress.best_epoch >= 0 else ""
        return f"loss {losses[-1]:.3f}{best}" if losses else best

    def _save(self) -> None:
        """One file, written beside its place and renamed: a killed run finds the old state or the new one."""
        tensors = {f"model.{name}": value.detach() for name, value in self.parameters.items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for name, value in self.parameters.items():
            for slot, part in self.optimizer.state[value].items():
                tensors[f"optimizer.{name}.{slot}"] = torch.as_tensor(part)
        notes = {"key": self.key, "progress": json.dumps(vars(self.progress)), "pending": json.dumps(self.pending)}
        partial = self.state_path.with_suffix(".partial")
        save_tensors(partial, tensors, notes)
        partial.rename(self.state_path)

    def _resume(self) -> Progress:
        if not self.state_path.exists():
            return Progress()
        with safe_open(self.state_path, framework="pt", device=str(self.device)) as state:
            notes: Mapping[str, str] = state.metadata()
            if notes["key"] != self.key:
                return Progress()
            with torch.no_grad():
                for name, value in self.parameters.items():
                    value.copy_(state.get_tensor(f"model.{name}"))
                    self.best[name] = state.get_tensor(f"best.{name}")
            slots = [name.removeprefix("optimizer.") for name in state.keys() if name.startswith("optimizer.")]  # noqa: SIM118
            for slot in slots:
                name, _, part = slot.rpartition(".")
                self.optimizer.state[self.parameters[name]][part] = state.get_tensor(f"optimizer.{slot}")
        self.pending = json.loads(notes["pending"])
        return Progress(**json.loads(notes["progress"]))


def computes_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products run in hardware, so that it is faster than fp32 and not an emulation."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported()) or bool(torch.cpu._is_amx_tile_supported())


def _parameter_groups(task: Task, config: TrainConfig) -> list[dict[str, Any]]:
    """Item parameters learn at their own rate; weight decay spares vectors, norms and embeddings."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    item_rate = config.item_learning_rate or config.learning_rate
    for name, value in task.objective.named_parameters():
        if value.requires_grad:
            of_items = any(part in name for part in task.item_parameters)
            decay = config.weight_decay if value.ndim > 1 and "table" not in name else 0.0
            groups.setdefault((item_rate if of_items else config.learning_rate, decay), []).append(value)
    return [{"params": values, "lr": rate, "weight_decay": decay} for (rate, decay), values in groups.items()]

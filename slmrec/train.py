"""THE training loop: any objective, one process or many, resumable to the bit, early stopping on validation NDCG@10.

A step's batch is the same whatever the number of processes and micro-batches: each takes its share of the rows, and
its loss, a mean over its own targets, counts by its share of the step's targets. So the curve of a run does not
depend on the devices, up to rounding; dropout alone draws other numbers on each.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from rich.console import Console
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from slmrec.config import TrainConfig
from slmrec.errors import ConfigError, TrainingError
from slmrec.gradients import dominant_term, is_measured, term_norms
from slmrec.processes import connect, on_main, process_count, process_index, sum_over_processes
from slmrec.progress import Bar, progress_bar
from slmrec.sequences import length_batches
from slmrec.sharding import collected, make_whole, prepared, sharded_as, usable, whole
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
    feature_norms: Tensor | None = None
    """Mean squared norm of the features over the whole step, [blocks]; None where this batch is the whole step."""

    @property
    def num_targets(self) -> int:
        """Targets in the batch."""
        return int((self.targets != 0).sum())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        moved = {name: part.to(device) for name, part in self._asdict().items() if part is not None}
        return self._replace(**moved)


class Objective(Protocol):
    """An nn.Module whose forward gives the loss, term by term."""

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Weighted terms by name, each a mean over the batch's targets; their sum is minimised."""
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
    Each process of a run calls this; `work` has to be the same folder for all, and the main process writes there.

    Raises:
        TrainingError: the loss or its gradient is no longer finite; all processes raise it.
        ConfigError: the processes do not see the same state in `work`.
    """
    connect(device)
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
        self.accelerator = _accelerator(device)
        _keep_buffers_at_home(task.objective)
        optimizer = torch.optim.AdamW(_parameter_groups(task, config), fused=True)
        self.objective, self.optimizer = prepared(self.accelerator, task.objective.to(device), optimizer)
        self.parameters = {n: p for n, p in task.objective.named_parameters() if p.requires_grad}
        self.best = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.steps_per_epoch = -(-len(task.lengths) // config.batch_size)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.bf16 = computes_in_bf16(config, device)
        self.pending: list[dict[str, float]] = []
        self.progress = self._resume()
        self._require_one_state()

    def epoch(self, bar: Bar) -> None:
        """Train what is left of the current epoch, then validate."""
        epoch, first = divmod(self.progress.step, self.steps_per_epoch)
        seed = self.config.seed * 1_000_003 + epoch
        batches = list(length_batches(self.task.lengths, self.config.batch_size, seed=seed))
        self.objective.train()
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
        make_whole(self.task.objective, self.best)

    def _step(self, rows: np.ndarray) -> None:
        step = self.progress.step
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self._schedule(step)
        values = self._backward(rows)
        norm = float(whole(self.accelerator.clip_grad_norm_(self.parameters.values(), self.config.clip_norm)))
        if not np.isfinite([values["loss"], norm]).all():
            raise TrainingError(
                f"{self.task.title}: the loss is {values['loss']} and its gradient norm {norm} at step {step}",
                remedy="a smaller --learning-rate; of a decoder also more --warmup-steps, or --precision fp32",
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self._log({"loss": values.pop("loss"), "gradient_norm": norm} | values)

    def _backward(self, rows: np.ndarray) -> dict[str, float]:
        """Gradients of one step; gives its loss and terms, over all processes."""
        parts = split_rows(rows, process_index(), process_count(), self.config.accumulate)
        batches = [self.task.batch(part if len(part) else rows[:1]) for part in parts]
        weighed = _weighed(batches, [len(part) > 0 for part in parts], self.device)
        totals: dict[str, Tensor] = {}
        for micro, (batch, share) in enumerate(weighed):
            is_last = micro == len(weighed) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.objective):
                terms = self._forward(batch.to(self.device), micro)
                loss = torch.stack(list(terms.values())).sum()
                if micro == 0:
                    self._measure_terms(terms)
                self.accelerator.backward(loss * (share * process_count()))  # processes' gradients are averaged
            for name, value in [("loss", loss), *terms.items()]:
                totals[name] = totals.get(name, 0) + value.detach() * share
        return dict(zip(totals, sum_over_processes(torch.stack(list(totals.values()))).tolist(), strict=True))

    def _measure_terms(self, terms: Mapping[str, Tensor]) -> None:
        """Log, now and then, how strongly each term pulls, and say so once where one drowns the others.

        One process's matter: the gradients of many belong to their wrapper, as checkpointed ones to theirs.
        """
        alone = process_count() == 1 and not self.config.checkpoint_gradients
        if len(terms) == 1 or not alone or not is_measured(self.progress.step):
            return
        before = dominant_term(self.progress.log)
        norms = term_norms(terms, list(self.parameters.values()))
        self.progress.log.append({"step": self.progress.step, "gradient_norms": norms})
        term = dominant_term(self.progress.log)
        if term is not None and term != before:
            share = 100 * norms[term] / sum(norms.values())
            Console(stderr=True).print(
                f"{self.task.title}: {term} holds {share:.0f} % of the terms' gradient norms; "
                "a smaller weight would let the others be heard"
            )

    def _forward(self, batch: Batch, micro: int) -> dict[str, Tensor]:
        """Terms of a micro-batch; dropout is a function of the step and the share, not of the past."""
        share = process_index() * self.config.accumulate + micro
        torch.manual_seed(self.config.seed * 2_000_003 + self.progress.step + 1_000_003 * share)
        with self._autocast():
            terms: dict[str, Tensor] = self.objective(batch)
        return terms

    def _autocast(self) -> AbstractContextManager[Any]:
        """The precision of training, in which validation between epochs runs as well."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def _log(self, record: dict[str, float]) -> None:
        self.pending.append(record)
        step = self.progress.step
        if step % LOG_EVERY_STEPS == 0 or step % self.steps_per_epoch == 0:
            means = {name: float(np.mean([record[name] for record in self.pending])) for name in record}
            self.progress.log.append({"step": step, "epoch": (step - 1) // self.steps_per_epoch} | means)
            self.pending = []

    def _validate(self, epoch: int) -> None:
        with usable(self.task.objective), self._autocast():
            metric = self.task.validate()  # by every process, in no more time than by one
        metric = on_main(lambda: metric)
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
        """The main process writes one file beside its place and renames it: a killed run finds the old or the new."""
        tensors = {f"model.{name}": collected(value.detach()) for name, value in self.parameters.items()}
        tensors |= {f"best.{name}": collected(value) for name, value in self.best.items()}
        for name, value in self.parameters.items():
            for slot, part in self.optimizer.state[value].items():
                tensors[f"optimizer.{name}.{slot}"] = collected(torch.as_tensor(part))
        on_main(lambda: self._write(tensors))

    def _write(self, tensors: Mapping[str, Tensor]) -> None:
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
                    value.copy_(sharded_as(state.get_tensor(f"model.{name}"), value))
                    self.best[name] = sharded_as(state.get_tensor(f"best.{name}"), value)
            slots = [name.removeprefix("optimizer.") for name in state.keys() if name.startswith("optimizer.")]  # noqa: SIM118
            for slot in slots:
                name, _, part = slot.rpartition(".")
                value, saved = self.parameters[name], state.get_tensor(f"optimizer.{slot}")
                self.optimizer.state[value][part] = sharded_as(saved, value) if saved.ndim else saved
        self.pending = json.loads(notes["pending"])
        return Progress(**json.loads(notes["progress"]))

    def _require_one_state(self) -> None:
        """Refuse to go on from different steps, as processes of several machines without a shared folder would."""
        main = on_main(lambda: self.progress.step)
        if sum_over_processes(torch.tensor(float(self.progress.step != main), device=self.device)) > 0:
            raise ConfigError(
                f"not every process sees the state of step {main} in {self.state_path.parent}",
                remedy="an --output in a folder that all machines share",
            )


def split_rows(rows: np.ndarray, index: int, count: int, accumulate: int) -> list[np.ndarray]:
    """The micro-batches of one of `count` processes: as many on each, some of them empty where rows are few.

    >>> [split_rows(np.arange(7), index, 2, 2) for index in (0, 1)]
    [[array([0, 4]), array([2, 6])], [array([1, 5]), array([3])]]
    """
    most = -(-len(rows) // count)
    parts = min(accumulate, most)
    own = rows[index::count]
    return [own[part::parts] for part in range(parts)]


def _weighed(batches: list[Batch], real: list[bool], device: torch.device) -> list[tuple[Batch, float]]:
    """Each micro-batch with its share of the step's targets, 0 for a stand-in, and with the step's `feature_norms`."""
    if process_count() * len(batches) == 1:
        return [(batches[0], 1.0)]
    counts = [batch.num_targets if counted else 0 for batch, counted in zip(batches, real, strict=True)]
    squares = [
        torch.linalg.vector_norm(batch.features, dim=-1, dtype=torch.float32).double().pow(2).sum(dim=0) * counted
        for batch, counted in zip(batches, real, strict=True)
        if batch.features is not None
    ]
    sums = torch.tensor([float(sum(counts))], dtype=torch.float64)
    if squares:
        sums = torch.cat([sums, torch.stack(squares).sum(dim=0)])
    total, *norms = sum_over_processes(sums.to(device)).tolist()
    feature_norms = torch.tensor(norms) / total if norms else None
    return [
        (batch._replace(feature_norms=feature_norms), count / total)
        for batch, count in zip(batches, counts, strict=True)
    ]


def _keep_buffers_at_home(objective: nn.Module) -> None:
    """Prompt and title vectors are constants, the same on every process: they are not sent at every step."""
    names = [name for name, _ in objective.named_buffers()]
    ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(objective, names)


def _accelerator(device: torch.device) -> Accelerator:
    """Accelerate as the loop needs it: precision and accumulation are the loop's own, whatever a launcher sets."""
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[ddp],
    )


def computes_in_bf16(config: TrainConfig, device: torch.device) -> bool:
    """Whether a run's decoder computes in bfloat16, its weights staying fp32."""
    return config.precision == "bf16" or (config.precision == "auto" and computes_bfloat16(device))


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

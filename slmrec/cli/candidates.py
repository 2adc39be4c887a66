"""What a search has made and measured: every candidate by the ordinary stages, every figure kept on disk."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from compress.prune import prune
from compress.quantize import quantize
from export.onnx_export import export_checkpoint
from slmrec.artifact import Artifact, canonical_hash, replace_json
from slmrec.cli.loading import load_recommender
from slmrec.cli.options import say
from slmrec.compress_config import CalibrationConfig, ImportanceConfig, PruneConfig, QuantizeConfig
from slmrec.config import ExportConfig, settings_of
from slmrec.dataset import Dataset
from slmrec.errors import ArtifactError, CheckError, ConfigError
from slmrec.evaluate import VALIDATION_PROTOCOL, Accuracy, evaluate
from slmrec.gate import gate_of
from slmrec.latency import REST_S, TURN, measure_latency
from slmrec.machine import describe_machine
from slmrec.models.checkpoint import build_model, quantized_layers, require_decoder
from slmrec.recommender import Recommender
from slmrec.search import Base, Candidate, Outcome, SearchConfig, finalists, kept_text, needless
from slmrec.sequences import Cases, validation_cases

SEARCH_FILE = "search.json"
OPEN_GATE = 1e-6
"""For `quantize` where the search's own gate judges."""
MACHINE = ("cpu", "usable_cores", "gpu")
"""What times of an earlier run have to have in common with this one to be read again."""

Run = Callable[[bool], tuple[Artifact, bool]]


def base_of(name: str, artifact: Artifact) -> Base:
    """A checkpoint as a search sees it.

    Raises:
        ArtifactError: it holds no decoder.
        ConfigError: it is 8-bit already.
    """
    model = require_decoder(build_model(artifact), artifact)
    if quantized_layers(model):
        raise ConfigError(
            f"{artifact.path} is an 8-bit checkpoint, which can be neither pruned nor healed",
            remedy="--checkpoint with its fp32 parent",
        )
    spec = asdict(replace(model.spec, title_size=model.spec.title_width))
    for name_of_depth in ("num_hidden_layers", "layer_types"):
        spec["decoder"].pop(name_of_depth, None)
    return Base(name, model.num_layers, canonical_hash(spec))


@dataclass
class Search:
    """One search below a folder. Another with the same settings finds all that this one made and measured."""

    artifacts: Mapping[str, Artifact]
    """Base name -> checkpoint."""
    data: Dataset
    config: SearchConfig
    folder: Path
    device: str = "auto"
    force: bool = False
    """Replace what was made with other settings or inputs, and measure all anew."""
    graphs: dict[str, Artifact] = field(default_factory=dict)
    """Candidate name -> its graph."""
    _reference: Accuracy | None = None
    _records: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        path = self.folder / SEARCH_FILE
        if path.exists() and not self.force:
            try:
                self._records = json.loads(path.read_text(encoding="utf-8"))
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise ArtifactError(f"{path} is not readable: {error}", remedy="--force to measure anew") from None

    @property
    def cases(self) -> Cases:
        """The users that are asked: validation ones, for a choice must not see the test."""
        return validation_cases(self.data.sequences)

    def outcomes(self, plan: Sequence[Candidate]) -> Iterator[Outcome]:
        """Make and measure one candidate after the other, unless what is known makes it needless."""
        known: list[Outcome] = []
        for number, candidate in enumerate(plan, 1):
            say(f"[{number}/{len(plan)}] {candidate.name}")
            outcome = self._outcome(candidate, plan[0], known)
            say(f"    {outcome.state}: {outcome.reason or _figures(outcome)}")
            known.append(outcome)
            yield outcome

    def timed_in_turn(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """All outcomes, the finalists' times measured in one run, in turn."""
        names = [outcome.candidate.name for outcome in finalists(outcomes, self.config.constraints)]
        if not names:
            return list(outcomes)
        key = self._key("in turn", sorted(self.graphs[name].hash for name in names))
        if key not in self._records:
            say(f"latency: {self.config.rounds} rounds of {len(names)} candidates in turn")
            self._keep(key, self._latency({name: self._load(self.graphs[name]) for name in names}))
        return [
            replace(one, row={**one.row, "latency": {"batch_1": self._records[key][name]}, "timed": "in turn"})
            if (name := one.candidate.name) in names and one.row is not None
            else one
            for one in outcomes
        ]

    def _outcome(self, candidate: Candidate, reference: Candidate, known: Sequence[Outcome]) -> Outcome:
        reason = needless(candidate, known, self.config.constraints)
        if reason is not None:
            return Outcome(candidate, reason=reason)
        try:
            graph = self._graph(candidate)
        except CheckError as error:  # its accuracy gate or its parity check did not hold: it is none to choose
            if candidate == reference:
                raise
            return Outcome(candidate, reason=error.problem, refused=True)
        self.graphs[candidate.name] = graph
        key = self._key("alone", graph.hash, self.graphs[reference.name].hash)
        if key not in self._records:
            self._keep(key, self._measured(graph, reference))
        row = {**self._records[key], "name": candidate.name, "artifact": str(graph.path), "timed": "alone"}
        return Outcome(candidate, row=row)

    def _graph(self, candidate: Candidate) -> Artifact:
        config = ExportConfig(int8_items=candidate.int8_items)
        checkpoint, output = self._checkpoint(candidate), self.folder / f"{candidate.name}-export"
        return self._made(lambda force: export_checkpoint(checkpoint, self.data, output, config, force=force))

    def _checkpoint(self, candidate: Candidate) -> Artifact:
        """The checkpoint of a candidate, its parents made before it."""
        output = self.folder / candidate.checkpoint
        if candidate.int8:
            parent = self._checkpoint(replace(candidate, int8=False, keeps_layers=False))
            bits = self._quantizing(candidate)
            return self._made(lambda force: quantize(parent, self.data, output, bits, device=self.device, force=force))
        base = self.artifacts[candidate.base.name]
        if not candidate.is_pruned:
            return base
        pruning = self._pruning(candidate)
        return self._made(lambda force: prune(base, self.data, output, pruning, device=self.device, force=force))

    def _quantizing(self, candidate: Candidate) -> QuantizeConfig:
        """All layers, judged by the search's gate alone; or by the stage's own, which keeps layers until it holds."""
        calibration = CalibrationConfig(seed=self.config.train.seed)
        gate = self.config.constraints.min_ndcg
        assert gate is not None
        keeps = candidate.keeps_layers
        return QuantizeConfig(accuracy_gate=gate if keeps else OPEN_GATE, auto_keep=keeps, calibration=calibration)

    def _pruning(self, candidate: Candidate) -> PruneConfig:
        train, epochs = self.config.train, candidate.heal_epochs
        return PruneConfig(
            num_layers=candidate.num_layers,
            heal_epochs=epochs,
            importance=ImportanceConfig(max_users=self.config.max_users, seed=train.seed),
            train=replace(train, epochs=max(1, epochs)),
        )

    def _made(self, run: Run) -> Artifact:
        """What a stage makes; with --force also in the place of what was made otherwise, but not of the same again."""
        try:
            return run(False)[0]
        except ArtifactError:
            if not self.force:
                raise
            return run(True)[0]

    def _measured(self, graph: Artifact, reference: Candidate) -> dict[str, Any]:
        """Accuracy against the reference, time alone, and size."""
        recommender = self._load(graph)
        accuracy = self._accuracy(recommender)
        if self._reference is None:
            whole = self.graphs[reference.name]
            self._reference = accuracy if whole is graph else self._accuracy(self._load(whole))
        gate = self.config.constraints.min_ndcg
        assert gate is not None
        return {
            "hash": graph.hash,
            "size_bytes": graph.size_bytes,
            "stages": graph.stages,
            "accuracy": accuracy.to_json(),
            "ratios": {"ndcg@10": gate_of(self._reference, accuracy, gate).to_json()},
            "latency": {"batch_1": self._latency({"": recommender})[""]},
        }

    def _accuracy(self, recommender: Recommender) -> Accuracy:
        return evaluate(recommender, self.cases, protocol=VALIDATION_PROTOCOL)

    def _latency(self, recommenders: Mapping[str, Recommender]) -> dict[str, dict[str, float]]:
        timings = measure_latency(recommenders, self.cases.histories, self.config.timing)
        return {name: timing.latency() for name, timing in timings.items()}

    def _load(self, graph: Artifact) -> Recommender:
        return load_recommender(graph, self.device)

    def _key(self, *what: object) -> str:
        """Of a measurement: what was measured, on which users, how, and where."""
        machine = {name: value for name, value in describe_machine().items() if name in MACHINE}
        how = settings_of(self.config.timing) | {"constraints": None, "turns": [TURN, REST_S]}
        return canonical_hash([what, self.data.hash, how, machine, self.device])

    def _keep(self, key: str, value: Any) -> None:
        self._records[key] = value
        replace_json(self.folder / SEARCH_FILE, self._records)


def _figures(outcome: Outcome) -> str:
    assert outcome.row is not None
    latency = outcome.row["latency"]["batch_1"]
    return f"NDCG@10 {kept_text(outcome.row)} of the reference's, p50 {latency['p50_ms']:.2f} ms"

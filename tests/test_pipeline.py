"""Every stage through the command line, on data with a known answer: item i is always followed by i + 1."""

import json

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from slmrec.artifact import open_artifact
from slmrec.cli.loading import load_recommender
from slmrec.cli.main import main
from slmrec.dataset import load_dataset
from slmrec.errors import ArtifactError, CheckError, ConfigError, DataError, SlmrecError
from slmrec.evaluate import check_lists
from slmrec.ragged import Ragged
from slmrec.recommender import PAD, Histories, Recommender
from slmrec.sequences import test_cases as held_out
from slmrec.synthetic import write_backbone, write_log

PRODUCTS = ("items", "teacher", "student", "student-int8", "export", "bundle", "student-pruned")
FAST = ["--precision", "fp32", "--batch-size", "32", "--learning-rate", "3e-3", "--item-learning-rate", "3e-3"]


def call(runs, *arguments):
    """One command, its stdout; errors are raised, not printed."""
    result = CliRunner().invoke(main, ["--runs", str(runs), *map(str, arguments)], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All stages as typed, one after the other."""
    runs = tmp_path_factory.mktemp("runs")
    call(runs, "data", write_log(runs / "log.txt"))
    call(runs, "train-items", "--epochs", 24, "--batch-size", 32, "--learning-rate", "3e-3", "--dropout", 0.1)
    backbone = write_backbone(runs / "backbone")
    teacher = ["--backbone", backbone, "--num-layers", 4, "--prompt", "none", "--dropout", 0, "--epochs", 16]
    trained = ["--max-history", 15]  # no longer than sequences that are learned from
    call(runs, "train-teacher", *teacher, *trained, "--warmup-steps", 10, *FAST)
    call(runs, "distill", "--num-layers", 2, "--num-blocks", 2, "--epochs", 8, "--warmup-steps", 10, *FAST)
    call(runs, "quantize", "--bits", 8)
    call(runs, "export")
    call(runs, "bundle")
    call(runs, "prune", "--num-layers", 1, "--heal-epochs", 6, "--warmup-steps", 10, *FAST)
    return runs


@pytest.fixture(scope="module")
def data(runs):
    return load_dataset(runs / "data")


@pytest.fixture(scope="module", params=PRODUCTS)
def recommender(request, runs):
    return load_recommender(open_artifact(runs / request.param), "cpu")


def test_the_known_answer_comes_first_at_every_stage(runs):
    for product in PRODUCTS:
        accuracy = json.loads(call(runs, "evaluate", "-m", runs / product, "--json"))
        assert accuracy["hr@1"] == 1.0, product


def test_every_product_keeps_the_promises_of_a_list(recommender, data):
    assert isinstance(recommender, Recommender)
    cases = held_out(data.sequences)
    answer = recommender.recommend(cases.histories, 20)
    check_lists(answer, cases.histories.exclude_ids, k=20, num_items=data.num_items)


def test_a_user_alone_gets_what_he_gets_in_company(recommender, data):
    cases = held_out(data.sequences)
    together = recommender.recommend(cases.histories, 10)
    for row in range(0, len(cases), 37):
        alone = recommender.recommend(cases.histories.select(np.array([row])), 10)
        assert alone.item_ids[0].tolist() == together.item_ids[row].tolist()
        np.testing.assert_allclose(alone.scores[0], together.scores[row], rtol=0, atol=1e-4)


def test_exclusions_are_honoured_beyond_the_history(recommender):
    history, excluded = Ragged.from_rows([[3, 4, 5]]), Ragged.from_rows([[6, 7]])
    items = recommender.recommend(Histories(history, excluded), 10).item_ids[0].tolist()
    assert not {3, 4, 5, 6, 7} & set(items)
    assert recommender.recommend(Histories(history, Ragged.from_rows([[]])), 1).item_ids[0, 0] == 6


def test_a_long_history_is_cut_to_its_newest_items_and_excluded_whole(recommender):
    long = [*range(1, 59)]
    answer = recommender.recommend(Histories.of(Ragged.from_rows([long])), 5)
    assert set(answer.item_ids[0].tolist()) == {59, 60, PAD}
    assert answer.scores[0].tolist()[2:] == [-np.inf] * 3


@pytest.mark.parametrize(
    ("rows", "k", "error"),
    [([[0]], 5, DataError), ([[-1]], 5, DataError), ([[61]], 5, DataError), ([[2**40]], 5, DataError),
     ([[1]], 0, ConfigError), ([[1]], 3841, ConfigError)],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_alike(recommender, rows, k, error):
    with pytest.raises(error):
        recommender.recommend(Histories.of(Ragged.from_rows(rows)), k)


def test_a_user_without_history_is_given_what_is_popular_by_every_product(recommender, data):
    counts = np.array(data.items.num_interactions)
    answer = recommender.recommend(Histories.of(Ragged.from_rows([[], [1, 2]])), 5)
    best = sorted(range(1, data.num_items + 1), key=lambda item: (-counts[item - 1], item))[:5]
    assert answer.item_ids[0].tolist() == best
    assert answer.scores[0].tolist() == counts[np.array(best) - 1].tolist()


def test_no_users_give_no_lists(recommender):
    assert recommender.recommend(Histories.of(Ragged.from_rows([])), 5).item_ids.shape == (0, 5)


def test_k_above_the_catalogue_gives_a_short_list(recommender, data):
    answer = recommender.recommend(Histories.of(Ragged.from_rows([[1, 2]])), 100)
    items = answer.item_ids[0]
    assert sorted(items[items != PAD].tolist()) == list(range(3, data.num_items + 1))


def test_a_bundle_says_how_its_8_bits_passed_their_gate(runs):
    gate = json.loads((runs / "student-int8" / "gate.json").read_text())["gate"]
    assert gate in ("passed", "underpowered")
    assert open_artifact(runs / "student-int8").manifest["gate"] == gate
    lineage = {entry["stage"]: entry for entry in open_artifact(runs / "bundle").manifest["lineage"]}
    assert {name for name, entry in lineage.items() if "gate" in entry} == {"quantize"}
    assert lineage["quantize"]["gate"] == gate
    told = "passed, but the users there were do not resolve it" if gate == "underpowered" else gate
    assert f"; accuracy gate: {told}" in (runs / "bundle" / "README.md").read_text()


def test_the_same_command_again_is_up_to_date_and_another_needs_force(runs):
    again = ["quantize", "--bits", 8, "-m", runs / "student"]
    assert json.loads(call(runs, *again, "--json"))["up_to_date"]
    with pytest.raises(ArtifactError, match="--force"):
        call(runs, *again, "--accuracy-gate", 0.5)


def test_a_dry_run_says_what_the_run_would_say(runs):
    again = ["distill", "--num-layers", 2, "--num-blocks", 2, "--epochs", 8, "--warmup-steps", 10, *FAST, "--dry-run"]
    assert json.loads(call(runs, *again, "--json"))["up_to_date"]
    with pytest.raises(ArtifactError, match=r"--force.*train.epochs: 8 -> 9"):
        call(runs, *again, "--epochs", 9)
    assert json.loads(call(runs, *again, "--epochs", 9, "-o", runs / "new", "--json"))["dry_run"]
    assert not (runs / "new").exists()


def test_the_bundle_verifies_and_names_its_whole_lineage(runs):
    call(runs, "verify")
    assert open_artifact(runs / "bundle").stages[-2:] == ["export", "bundle"]
    assert {"data", "train-items", "train-teacher", "distill", "quantize"} <= set(open_artifact(runs / "bundle").stages)


def test_training_terms_are_logged_by_name(runs):
    records = [json.loads(line) for line in (runs / "student" / "training.jsonl").read_text().splitlines()]
    assert set(records[0]["gradient_norms"]) == {"ce", "direction", "magnitude", "supervision"}
    terms = {name for record in records for name in record}
    assert {"ce", "direction_block_1", "direction_block_2", "magnitude_block_1", "supervision_block_1"} <= terms


def test_recommend_maps_external_ids_and_keeps_the_order(runs, tmp_path):
    requests = [{"user": "a", "history": ["7", "8"]}, {"user": "b", "history": ["20"], "exclude": ["21"]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(request) + "\n" for request in requests))
    call(runs, "recommend", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.parquet", "-k", 3)
    rows = pl.read_parquet(tmp_path / "out.parquet").to_dicts()
    assert [row["user"] for row in rows] == ["a", "b"]
    assert rows[0]["items"][0] == "9"
    assert "21" not in rows[1]["items"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "--num-layers", "9", "-o", "x"], "student would have 9 layers, the teacher has 4"),
        (["distill", "--num-layers", "2", "--num-blocks", "3"], "cannot be cut into num_blocks=3"),
        (["distill", "--seed", "-1", "-o", "x"], "seed=-1 is below 0"),
        (["train-items", "--seed", str(2**63), "-o", "x"], "is above 9223372036854775807"),
        (["train-items", "--hidden-size", "99999999999", "-o", "x"], "hidden_size=99999999999 is above 16384"),
        (["train-items", "--learning-rate", "inf", "-o", "x"], "a learning rate of inf is not finite"),
        (["train-items", "--hidden-size", "0", "-o", "x"], "hidden_size=0 is below 1"),
        (["train-items", "--weight-decay", "-1", "-o", "x"], "weight_decay=-1.0 is below 0"),
        (["distill", "--signal", "logits"], "belong to online distillation"),
        (["distill", "--online", "--list-weight", "1"], "frozen teacher"),
        (["distill", "--online", "--signal", "logits", "--direction-weight", "1"], "compare no features"),
        (["distill", "--online", "--signal", "logits", "--num-layers", "9", "-o", "x"], "would have 9 layers"),
        (["distill", "--online", "--direction-weight", "0", "--magnitude-weight", "0"], "nothing follows the teacher"),
        (["distill", "--online", "--features", "live"], "wherever --features says"),
        (["distill", "--online", "--features", "stored"], "wherever --features says"),
        (["distill", "--online", "--keep-features"], "none are stored"),
        (["distill", "--features", "live", "--keep-features"], "at every step are not stored"),
        (["distill", "--features", "live", "--feature-dtype", "float32"], "at every step are not stored"),
        (["distill", "--hidden-size", "32", "-o", "x"], "cannot be copied"),
        (["distill", "-m", "{runs}/items", "-o", "x"], "without a decoder"),
        (["distill", "-m", "{runs}/data", "-o", "x"], "is a dataset .*expected a checkpoint"),
        (["distill", "-m", "{runs}/nowhere", "-o", "x"], "does not exist"),
        (["quantize", "--bits", "4"], "bits=4 is not supported"),
        (["quantize", "-m", "{runs}/student-int8", "-o", "x"], "8-bit checkpoint already"),
        (["export", "--top-k", "3841"], "possible are 1 to 3840"),
        (["quantize", "--calibration-histories", "0"], "nothing to calibrate on"),
        (["quantize", "--keep-fp", "layers.9.*", "-o", "x"], "no layer matches --keep-fp 'layers.9"),
        (["prune"], "nothing is to be pruned"),
        (["prune", "--num-layers", "2", "-o", "x"], "num_layers=2, but .*student has 2 layers"),
        (["prune", "--num-layers", "0"], "num_layers=0 is below 1"),
        (["prune", "--drop", "1,x"], "is no list of layers"),
        (["prune", "--num-layers", "1", "-m", "{runs}/student-int8", "-o", "x"], "cannot be healed"),
        (["sensitivity", "-m", "{runs}/student-int8", "-o", "x"], "8-bit checkpoint already"),
        (["importance", "-m", "{runs}/items", "-o", "x"], "without a decoder"),
        (["train-teacher", "--backbone", "{runs}/data", "-o", "x"], "config.json|not a supported decoder"),
        (["train-teacher", "--supervision", "all", "--prompt", "slmrec"], "supervision=all"),
        (["evaluate", "-m", "{runs}/data"], "is a dataset"),
        (["recommend", "99999"], "99999"),
    ],
)
def test_bad_input_is_a_message_with_a_remedy(runs, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in runs.iterdir())
    with pytest.raises(SlmrecError, match=message) as caught:
        call(runs, *[argument.format(runs=runs) for argument in arguments])
    assert caught.value.remedy
    assert sorted(path.name for path in runs.iterdir() if not path.name.endswith(".work")) == before


def test_a_gate_that_cannot_be_met_writes_nothing(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "slmrec.gate.ratio_of_means", lambda *_: type("R", (), {"estimate": 0.5, "low": 0.4, "high": 0.6})
    )
    with pytest.raises(CheckError, match=r"8 bits cost too much.*layers\."):
        call(runs, "quantize", "-m", runs / "student", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_analyses_work_as_typed(runs, tmp_path):
    sensitivity = json.loads(call(runs, "sensitivity", "--json", "-m", runs / "student", "-o", tmp_path / "s"))
    assert len(sensitivity["layers"]) == 14
    assert "NDCG@10 lost" in call(runs, "sensitivity", "-m", runs / "student", "-o", tmp_path / "s")
    importance = json.loads(call(runs, "importance", "--json", "-m", runs / "student", "-o", tmp_path / "i"))
    assert [one["layer"] for one in importance["layers"]] == [0, 1]
    assert {path.name for path in (tmp_path / "s").iterdir()} == {
        "manifest.json", "sensitivity.json", "sensitivity.svg", "sensitivity.png"
    }  # fmt: skip


def test_few_calibration_histories_are_warned_of(runs, tmp_path):
    command = ["--runs", str(runs), "quantize", "--calibration-histories", "8", "-m", str(runs / "student")]
    result = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "out")], standalone_mode=False)
    assert "calibration has 8 histories" in result.stderr


def test_llm_int8_as_typed_passes_its_gate_and_keeps_the_known_answer(runs, tmp_path):
    made = call(runs, "quantize", "--backend", "bitsandbytes", "-m", runs / "student", "-o", tmp_path / "bnb", "--json")
    assert json.loads(made)["gate"]["passed"]
    assert json.loads(call(runs, "evaluate", "-m", tmp_path / "bnb", "--json"))["hr@1"] == 1.0


def test_a_teacher_of_another_catalogue_is_refused(runs, tmp_path):
    call(tmp_path, "data", write_log(tmp_path / "log.txt", num_items=50))
    with pytest.raises(ArtifactError, match="different catalogues: 60 and 50 items"):
        call(tmp_path, "distill", "-m", runs / "teacher")

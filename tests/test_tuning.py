"""slmcompress tune: real stages on a random model; what is chosen keeps to the bounds, and nothing is made twice."""

import json
import shutil

import pytest
from click.exceptions import Abort
from click.testing import CliRunner
from imported import call

import slmrec.cli.candidates
from export.verify import verify
from slmrec.artifact import Stage, open_artifact, publish
from slmrec.cli.main import main
from slmrec.config import DataConfig
from slmrec.dataset import load_dataset
from slmrec.errors import ArtifactError, CheckError, ConfigError, SlmrecError
from slmrec.evaluate import VALIDATION_PROTOCOL, evaluate
from slmrec.interactions import prepare_dataset
from slmrec.models.checkpoint import load_checkpoint, save_checkpoint
from slmrec.sequences import validation_cases
from slmrec.synthetic import write_log

FAST = ["--precision", "fp32", "--batch-size", "32", "--max-users", "20", "--rounds", "4", "--num-layers", "1"]
LOOSE = ["--max-latency-ms", "p50=100000", "--accuracy-gate", "0.05", *FAST]


@pytest.fixture(scope="module")
def started(tiny_model, tmp_path_factory):
    """Data, and a random student of 3 layers."""
    runs = tmp_path_factory.mktemp("runs")
    prepare_dataset([write_log(runs / "log.txt", num_items=30, num_users=50)], runs / "data", DataConfig())
    data = load_dataset(runs / "data")
    with publish(runs / "teacher", Stage(name="train-teacher", kind="checkpoint", settings={"window": {}})):
        pass
    write_student(runs, tiny_model(prompt="none", num_items=data.num_items))
    return runs


def write_student(runs, model):
    parents = {"teacher": open_artifact(runs / "teacher")}
    stage = Stage(name="distill", kind="checkpoint", settings={}, parents=parents)
    with publish(runs / "student", stage) as folder:
        save_checkpoint(folder, model)
        load_dataset(runs / "data").items.save(folder)


@pytest.fixture(scope="module")
def killed(started, tmp_path_factory):
    """The runs of a search that was killed while it exported its third candidate, and when its files were written."""
    runs = tmp_path_factory.mktemp("searched") / "runs"
    shutil.copytree(started, runs)
    export, calls = slmrec.cli.candidates.export_checkpoint, []

    def until_killed(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return export(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slmrec.cli.candidates, "export_checkpoint", until_killed)
        result = CliRunner().invoke(main, ["--runs", str(runs), "tune", *LOOSE], standalone_mode=False)
    assert isinstance(result.exception, (Abort, KeyboardInterrupt))
    return runs, times(runs)


@pytest.fixture(scope="module")
def searched(killed):
    """The same search, finished: its runs and its JSON."""
    runs, _ = killed
    return runs, json.loads(call(runs, "tune", *LOOSE, "--json"))


@pytest.fixture
def fresh(started, tmp_path):
    return shutil.copytree(started, tmp_path / "runs")


def row_of(result, name):
    return next(one for one in result["candidates"] if one["name"] == name)


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_the_cheap_are_measured_and_none_is_healed_that_need_not_be(searched):
    runs, result = searched
    states = {one["name"]: one["state"] for one in result["candidates"]}
    assert {name for name, state in states.items() if state == "measured"} == {
        f"student{depth}{bits}{items}" for depth in ("", "-l1") for bits in ("", "-int8") for items in ("", "-items8")
    }
    assert set(states.values()) == {"measured", "skipped"}
    assert "student-l1 is no larger and keeps to every bound" in row_of(result, "student-l1-heal1")["reason"]
    made = {path.name for path in (runs / "tune").iterdir() if path.is_dir()}
    exported = {f"{name}-export" for name, state in states.items() if state == "measured"}
    assert made == exported | {"student-int8", "student-l1", "student-l1-int8"}


def test_the_fastest_is_chosen_and_its_bundle_verifies(searched):
    runs, result = searched
    rows = [one for one in result["candidates"] if one["state"] == "measured"]
    assert {one["timed"] for one in rows} == {"in turn"}
    fastest = min(rows, key=lambda one: one["latency"]["batch_1"]["p50_ms"])
    assert result["chosen"]["name"] == fastest["name"]
    assert result["output"] == str(runs / "tuned-bundle")
    assert verify(runs / "tuned-bundle").parity.num_users == 50
    parent = open_artifact(runs / "tuned-bundle", "bundle").manifest["parents"]["graph"]
    assert parent["hash"] == fastest["hash"]


def test_accuracy_is_the_checkpoints_on_validation_users(searched):
    runs, result = searched
    cases = validation_cases(load_dataset(runs / "data").sequences)
    found = {
        name: evaluate(load_checkpoint(open_artifact(folder)), cases, protocol=VALIDATION_PROTOCOL)
        for name, folder in (("student", runs / "student"), ("student-l1", runs / "tune" / "student-l1"))
    }
    for name, accuracy in found.items():
        row = row_of(result, name)
        assert row["accuracy"]["protocol"] == VALIDATION_PROTOCOL
        ratio = accuracy.user_ndcg_10.mean() / found["student"].user_ndcg_10.mean()
        assert row["ratios"]["ndcg@10"]["ratio"] == pytest.approx(ratio)
    assert row_of(result, "student-l1")["ratios"]["ndcg@10"]["low"] < ratio < 1


def test_the_same_search_again_makes_and_measures_nothing(searched):
    runs, result = searched
    before = times(runs)
    again = json.loads(call(runs, "tune", *LOOSE, "--json"))
    assert again == result | {"up_to_date": True}
    assert times(runs) == before


def test_a_killed_search_goes_on_where_it_was(killed, searched):
    runs, before = killed
    made = {path.parent.name for path in before if path.name == "model.onnx"}
    assert made == {"student-export", "student-items8-export"}
    after = times(runs)
    assert {path for path in before if after.get(path) != before[path]} == {runs / "tune" / "search.json"}


def test_a_bound_on_size_that_excludes_the_unpruned_leaves_a_pruned_one(searched, tmp_path):
    runs, result = searched
    whole, pruned = (row_of(result, name)["size_bytes"] / 1e6 for name in ("student-int8", "student-l1-items8"))
    assert pruned < whole
    bound = ["--max-size-mb", str((whole + pruned) / 2), "-o", tmp_path / "bundle", "--heal-epochs", "0"]
    tight = json.loads(call(runs, "tune", *LOOSE, *bound, "--json"))
    assert tight["chosen"]["name"].startswith("student-l1")
    assert "MB are above" in row_of(tight, "student")["breaks"][0]
    verify(tmp_path / "bundle")


@pytest.mark.slow
def test_what_fails_the_gate_is_healed_from_the_unpruned_and_once(fresh):
    arguments = ["tune", *FAST, "--accuracy-gate", "0.8", "--no-int8-items", "-m", fresh / "student"]
    text = call(fresh, *arguments)
    healed = open_artifact(fresh / "tune" / "student-l1-heal1")
    assert healed.settings["heal_epochs"] == 1
    assert healed.manifest["parents"]["model"]["hash"] == open_artifact(fresh / "student").hash
    assert "| student-l1-heal1 | " in text
    before = times(fresh)
    assert call(fresh, *arguments).startswith(text.rpartition("\n")[0].rpartition("\n")[0])
    assert times(fresh) == before


@pytest.mark.slow
def test_where_8_bits_in_all_layers_fail_the_gate_some_are_kept(fresh):
    few = [*FAST, "--heal-epochs", "0", "--no-int8-items"]
    result = json.loads(call(fresh, "tune", *few, "--accuracy-gate", "0.98", "--json"))
    ratios = [row_of(result, f"student{bits}")["ratios"]["ndcg@10"]["ratio"] for bits in ("", "-int8", "-int8-keep")]
    assert ratios[1] < 0.98 <= ratios[2]
    assert json.loads((fresh / "tune" / "student-int8-keep" / "gate.json").read_text())["kept_fp"]
    assert "student-l1 fails the gate" in row_of(result, "student-l1-int8-keep")["reason"]


def test_bounds_that_nothing_keeps_to_name_the_nearest_and_bundle_nothing(searched, tmp_path):
    runs, _ = searched
    tight = ["--max-latency-ms", "p50=0.001", "--accuracy-gate", "0.05", *FAST, "-o", tmp_path / "bundle", "--json"]
    result = CliRunner().invoke(main, ["--runs", str(runs), "tune", *tight])
    assert isinstance(result.exception, CheckError)
    assert "came nearest: p50" in str(result.exception)
    assert "ms is above 0.001" in str(result.exception)
    assert result.stdout == ""
    assert "| student-l1-heal1 | – | – | – | – | skipped: student-l1 is no larger and exceeds" in result.stderr
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-latency-ms", "p42=5"], "p42=5.0 is no bound"),
        (["--max-latency-ms", "fast"], "'fast' is no bound"),
        (["--max-latency-ms", "p99=5", "--rounds", "20"], "p99 of 20 rounds says nothing"),
        (["--accuracy-gate", "0"], "min_ndcg=0.0"),
        (["--accuracy-gate", "1.5"], "accuracy_gate=1.5 is no share"),
        (["--max-size-mb", "-3"], "max_size_mb=-3.0 is not above 0"),
        (["--num-layers", "3"], "the deepest checkpoint has 3 layers"),
        (["-m", "nowhere"], "nowhere does not exist"),
        (["-m", "student", "-m", "student"], "named twice"),
        (["-o", "student"], "holds a checkpoint"),
    ],
)
def test_bad_input_is_one_message_before_anything_is_made(started, monkeypatch, arguments, message):
    monkeypatch.chdir(started)
    with pytest.raises(SlmrecError, match=message.replace("(", r"\(")) as error:
        call(".", "tune", *arguments)
    assert error.value.remedy
    assert not (started / "tune").exists()


def test_without_a_student_it_is_said_how_one_is_made(tmp_path):
    with pytest.raises(ArtifactError, match="holds no student"):
        call(tmp_path, "tune")


def test_an_8_bit_checkpoint_is_no_start(searched):
    runs, _ = searched
    with pytest.raises(ConfigError, match="is an 8-bit checkpoint"):
        call(runs, "tune", "-m", runs / "tune" / "student-int8")


@pytest.mark.slow
def test_another_students_candidates_are_replaced_on_request_alone(searched, tiny_model, tmp_path):
    runs = shutil.copytree(searched[0], tmp_path / "runs")
    write_student(runs, tiny_model(prompt="none", num_items=30, intermediate_size=96))
    few = [*LOOSE, "--no-int8-items", "--heal-epochs", "0"]
    with pytest.raises(ArtifactError, match="other settings or inputs"):
        call(runs, "tune", *few)
    call(runs, "tune", *few, "--force")
    verify(runs / "tuned-bundle")


def test_a_dry_run_names_the_candidates_in_order_and_makes_nothing(started):
    text = call(started, "tune", "--dry-run", "--no-int8-items", "--num-layers", "2", "--heal-epochs", "2")
    assert text.split() == [
        "student", "student-int8", "student-int8-keep", "student-l2", "student-l2-int8", "student-l2-int8-keep",
        "student-l2-heal2", "student-l2-heal2-int8", "student-l2-heal2-int8-keep",
    ]  # fmt: skip
    assert not (started / "tune").exists()

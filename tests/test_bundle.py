"""A bundle verifies as it was made, and with one byte changed anywhere it does not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from export.bundle import bundle
from export.onnx_export import export_checkpoint
from export.parity import ParityRule, compare, require_kept_ndcg
from export.runtime import OnnxRecommender
from export.verify import verify
from slmrec.artifact import Stage, open_artifact, publish
from slmrec.cli.main import main
from slmrec.config import DataConfig, ExportConfig
from slmrec.dataset import load_dataset
from slmrec.errors import ArtifactError, CheckError, ConfigError
from slmrec.interactions import prepare_dataset
from slmrec.models.checkpoint import save_checkpoint
from slmrec.recommender import TopK
from slmrec.synthetic import write_log

FP32, INT8 = ParityRule(precision="fp32"), ParityRule(precision="int8")


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """A bundle of a random model."""
    runs = tmp_path_factory.mktemp("runs")
    prepare_dataset([write_log(runs / "log.txt", num_items=40, num_users=60)], runs / "data", DataConfig())
    data = load_dataset(runs / "data")
    with publish(runs / "student", Stage(name="distill", kind="checkpoint", settings={})) as folder:
        save_checkpoint(folder, tiny_model(prompt="none", num_items=data.num_items))
        data.items.save(folder)
    graph, _ = export_checkpoint(open_artifact(runs / "student"), data, runs / "export", ExportConfig())
    bundle(graph, data, runs / "bundle")
    return runs / "bundle"


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "copy"))


def test_a_bundle_verifies_wherever_it_is_moved(copy):
    verified = verify(copy)
    assert verified.parity.num_equal_lists == verified.parity.num_users == 60
    assert verified.num_files == len(files(copy))


def test_two_bundles_of_one_run_are_the_same_to_the_byte(made, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    data, contents = load_dataset(made.parent / "data"), []
    for name in ("first", "second"):
        made_again, _ = bundle(open_artifact(made.parent / "export"), data, made.parent / name)
        assert made_again.manifest["created"].startswith("2023-11-14T22:13:20")
        contents.append({path.relative_to(made_again.path): path.read_bytes() for path in files(made_again.path)})
    assert contents[0] == contents[1]
    for wrong in ("yesterday", "-5", "253402300800", "9" * 30):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", wrong)
        with pytest.raises(ConfigError, match=f"SOURCE_DATE_EPOCH='{wrong}'"):
            bundle(open_artifact(made.parent / "export"), data, made.parent / "third")
        assert not (made.parent / "third").exists()


def test_a_bundle_holds_what_the_contract_names(made):
    names = {path.relative_to(made).as_posix() for path in files(made)}
    assert {"model.onnx", "model.onnx.data", "signature.json", "items.parquet", "golden.npz", "README.md"} <= names
    assert {"manifest.json", "SHA256SUMS", "triton/recommend/config.pbtxt"} <= names
    assert {f"triton/recommend/1/model.onnx/{name}" for name in ("model.onnx", "model.onnx.data")} <= names
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=made, check=False).returncode == 0


def test_one_changed_byte_in_any_file_fails(copy):
    for path in files(copy):
        original = path.read_bytes()
        for place in {0, len(original) // 2, len(original) - 1}:
            changed = bytearray(original)
            changed[place] ^= 0x20
            path.write_bytes(bytes(changed))
            with pytest.raises((CheckError, ArtifactError)):
                verify(copy)
        path.write_bytes(original)
    verify(copy)


@pytest.mark.parametrize("change", ["extra", "missing", "link", "appended"])
def test_files_that_come_or_go_fail(copy, change):
    if change == "extra":
        (copy / "plugin.so").write_bytes(b"x")
    elif change == "missing":
        (copy / "README.md").unlink()
    elif change == "link":
        (copy / "README.md").unlink()
        (copy / "README.md").symlink_to("/etc/hostname")
    else:
        with (copy / "SHA256SUMS").open("a") as stream:
            stream.write("\n")
    with pytest.raises(CheckError, match="does not verify"):
        verify(copy)


def test_answers_that_differ_fail_even_when_all_sums_are_right(made, tmp_path):
    from export.bundle import write_sums

    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    with np.load(copy / "golden.npz") as stored:
        golden = dict(stored)
    golden["top_items"][0, [0, 1]] = golden["top_items"][0, [1, 0]]
    np.savez(copy / "golden.npz", **golden)
    manifest = json.loads((copy / "manifest.json").read_text())
    from slmrec.artifact import file_sha256

    entry = {"sha256": file_sha256(copy / "golden.npz"), "size_bytes": (copy / "golden.npz").stat().st_size}
    manifest["files"]["golden.npz"] = entry
    (copy / "manifest.json").write_text(json.dumps(manifest))
    write_sums(copy)
    with pytest.raises(CheckError, match="do not answer alike"):
        verify(copy)


def test_what_is_wrong_is_said(copy):
    (copy / "new.txt").touch()
    with pytest.raises(CheckError, match=r"new\.txt is not listed"):
        verify(copy)
    (copy / "new.txt").unlink()
    (copy / "README.md").rename(copy.parent / "README.md")
    with pytest.raises(CheckError, match=r"README\.md is missing"):
        verify(copy)


def test_a_link_to_a_bundle_is_that_bundle(copy):
    (copy.parent / "current").symlink_to(copy.name)
    assert verify(copy.parent / "current").num_files == len(files(copy))


def test_a_provider_that_is_not_there_is_refused(made):
    with pytest.raises(ConfigError, match="NoSuchProvider was asked for; this ONNX Runtime has"):
        OnnxRecommender(made, provider="NoSuchProvider")
    with pytest.raises(ConfigError, match="NoSuchProvider was asked for"):
        verify(made, provider="NoSuchProvider")


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="has no SHA256SUMS, so it is no bundle"):
        verify(tmp_path)
    with pytest.raises(ArtifactError, match="is no folder"):
        verify(tmp_path / "nowhere")


def test_verify_and_recommend_need_no_pytorch(made):
    script = (
        "import sys; from pathlib import Path; from export.verify import verify\n"
        f"verify(Path({str(made)!r}))\n"
        "import slmrec.errors, slmrec.config, export.runtime\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def top(items, scores):
    return TopK(np.array([items]), np.array([scores], dtype=np.float32))


def test_near_ties_may_swap_and_nothing_else():
    expected = top([3, 5, 7], [10.0, 9.0, 8.99999])
    compare(expected, top([3, 7, 5], [10.0, 9.0, 8.99999]), FP32)
    with pytest.raises(CheckError):
        compare(expected, top([5, 3, 7], [10.0, 9.0, 8.99999]), FP32)
    with pytest.raises(CheckError):
        compare(expected, top([3, 5, 9], [10.0, 9.0, 8.5]), FP32)


def test_a_strange_item_at_the_end_needs_a_score_like_the_last():
    compare(top([3, 5], [10.0, 9.0]), top([3, 8], [10.0, 9.00001]), FP32)
    with pytest.raises(CheckError):
        compare(top([3, 5], [10.0, 9.0]), top([8, 5], [10.0, 9.0]), FP32)


@pytest.mark.parametrize("rule", [FP32, INT8])
def test_nan_never_passes(rule):
    with pytest.raises(CheckError):
        compare(top([1, 2], [1.0, 0.5]), top([1, 2], [np.nan, 0.5]), rule)
    with pytest.raises(CheckError):
        compare(top([1, 2], [1.0, 0.5]), top([1, 2], [1.0, -np.inf]), rule)


@pytest.mark.parametrize(("lost", "won", "passes"), [(0, 0, True), (6, 14, True), (13, 7, True), (20, 2, False)])
def test_a_lower_ndcg_fails_where_chance_does_not_explain_it(lost, won, passes):
    """Of 1,000 users most keep their list; those who lose have their target at the end or nowhere."""
    targets = np.ones(1000, dtype=np.int64)
    here, gone = np.array([1, 2]), np.array([2, 3])
    before, after = (np.tile(here, (1000, 1)) for _ in range(2))
    before[:won], before[won : won + lost] = gone, here
    after[:won], after[won : won + lost] = here, gone
    before[500:], after[500:] = gone, gone
    one, other = (TopK(ids, np.ones((1000, 2), dtype=np.float32)) for ids in (before, after))
    if passes:
        require_kept_ndcg(one, other, targets, INT8)
    else:
        with pytest.raises(CheckError, match=r"NDCG@10 is 0\.\d+, that of the checkpoint"):
            require_kept_ndcg(one, other, targets, INT8)


def test_8_bit_lists_must_overlap():
    compare(top([1, 2], [1.0, 0.5]), top([2, 1], [0.9, 0.6]), INT8)
    with pytest.raises(CheckError, match="overlap"):
        compare(top([1, 2], [1.0, 0.5]), top([1, 3], [1.0, 0.5]), INT8)


@pytest.mark.parametrize("place", ["initializer", "two locations", "none", "constant", "branch"])
def test_weights_outside_the_bundle_are_refused_wherever_a_graph_names_them(tmp_path, place):
    import onnx
    from onnx import TensorProto, helper

    from export.verify import _require_data_inside

    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    locations = {"two locations": ["model.onnx.data", "/etc/passwd"], "none": []}.get(place, ["../other.data"])
    for location in locations:
        tensor.external_data.add(key="location", value=location)
    nodes, initializers = [], []
    if place == "constant":
        nodes = [helper.make_node("Constant", [], ["w"], value=tensor)]
    elif place == "branch":
        branch = helper.make_graph([], "then", [], [], [tensor])
        nodes = [
            helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=helper.make_graph([], "e", [], []))
        ]
    else:
        initializers = [tensor]
    graph = helper.make_graph(nodes, "g", [], [], initializers)
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    with pytest.raises(CheckError, match="reads its weights from"):
        _require_data_inside(tmp_path / "model.onnx")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two pairs of keys as OpenSSL writes them: mine.pem, mine.pub.pem, other.pem, other.pub.pem."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    folder = tmp_path_factory.mktemp("keys")
    for name in ("mine", "other"):
        key = Ed25519PrivateKey.generate()
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (folder / f"{name}.pem").write_bytes(private)
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pub.pem").write_bytes(public)
    return folder


@pytest.fixture
def signed(made, keys, tmp_path):
    data = load_dataset(made.parent / "data")
    artifact, _ = bundle(open_artifact(made.parent / "export"), data, tmp_path / "signed", key=keys / "mine.pem")
    return artifact.path


def test_a_signed_bundle_verifies_with_the_signers_key_alone(signed, keys):
    assert verify(signed, key=keys / "mine.pub.pem").notes == []
    assert verify(signed).notes == ["the signature was not checked (--key)"]
    with pytest.raises(CheckError, match=r"was not signed by the owner of other\.pub\.pem"):
        verify(signed, key=keys / "other.pub.pem")


def test_signing_without_its_library_says_what_to_install(made, keys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    data, graph = load_dataset(made.parent / "data"), open_artifact(made.parent / "export")
    with pytest.raises(ConfigError, match="signatures need the package cryptography"):
        bundle(graph, data, tmp_path / "signed", key=keys / "mine.pem")
    assert not (tmp_path / "signed").exists()


def test_an_unsigned_bundle_fails_where_a_signature_is_asked_for(copy, keys):
    with pytest.raises(CheckError, match="is not signed"):
        verify(copy, key=keys / "mine.pub.pem")


def test_an_update_signs_anew_or_says_that_it_did_not(signed, keys, tmp_path):
    (tmp_path / "gone.txt").write_text("5\n")
    for name, flags in (("again", ["--sign", str(keys / "other.pem")]), ("plain", [])):
        command = ["update-items", str(signed), "--retire", str(tmp_path / "gone.txt"), "-o", str(tmp_path / name)]
        said = CliRunner().invoke(main, [*command, *flags], standalone_mode=False)
        assert said.exception is None
        assert ("not signed any more" in said.stdout) == (name == "plain")
        assert "40 items, room for" in said.stdout
    verify(tmp_path / "again", key=keys / "other.pub.pem")
    with pytest.raises(CheckError, match="is not signed"):
        verify(tmp_path / "plain", key=keys / "other.pub.pem")


@pytest.mark.parametrize("harm", ["file and sums", "signature", "signature of another bundle", "link"])
def test_a_signed_bundle_that_was_changed_fails_before_anything_else_is_read(signed, made, keys, tmp_path, harm):
    from export.bundle import write_sums

    if harm == "file and sums":  # who can change a file can change its checksum
        (signed / "README.md").write_text("other words")
        write_sums(signed)
    elif harm == "signature":
        content = bytearray((signed / "SHA256SUMS.sig").read_bytes())
        content[5] ^= 1
        (signed / "SHA256SUMS.sig").write_bytes(content)
    elif harm == "signature of another bundle":
        write_sums(signed, keys / "other.pem")
    else:
        (signed / "SHA256SUMS.sig").rename(tmp_path / "elsewhere")
        (signed / "SHA256SUMS.sig").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckError, match=r"was not signed by the owner|is not signed"):
        verify(signed, key=keys / "mine.pub.pem")


@pytest.mark.parametrize(
    ("name", "content"), [("gone.pem", None), ("text.pem", b"no key"), ("public.pem", "mine.pub.pem")]
)
def test_keys_that_are_none_are_refused_and_nothing_is_written(made, keys, tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes((keys / content).read_bytes() if isinstance(content, str) else content)
    data = load_dataset(made.parent / "data")
    with pytest.raises(ConfigError, match=r"cannot be read|is no private Ed25519 key"):
        bundle(open_artifact(made.parent / "export"), data, tmp_path / "bundle", key=tmp_path / name)
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(ConfigError, match="is no public Ed25519 key"):
        verify(made, key=keys / "mine.pem")

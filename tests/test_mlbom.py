"""The ML-BOM of a bundle: valid by CycloneDX's own schema, and true of the files beside it."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from huggingface_hub import ModelCard

from export.bundle import bundle
from export.mlbom import MLBOM_FILE, NEEDED, ml_bom, model_lineage
from export.onnx_export import export_checkpoint
from export.runtime import OnnxRecommender
from export.update import update_items
from export.verify import verify
from slmrec.artifact import Artifact, Stage, file_sha256, open_artifact, publish, write_json
from slmrec.config import DataConfig, ExportConfig
from slmrec.dataset import load_dataset
from slmrec.differences import differences
from slmrec.interactions import prepare_dataset
from slmrec.models.checkpoint import save_checkpoint
from slmrec.sources import SOURCES
from slmrec.synthetic import write_log
from slmrec.versions import library_versions

FIXTURE = Path(__file__).parent / "fixtures" / "bundle_2026_11_25.tar.xz"
ACCURACY = {
    "hr@1": 0.25, "ndcg@10": 0.5, "protocol": "leave-one-out test", "intervals": {"ndcg@10": [0.4, 0.6]}
}  # fmt: skip
LATENCY = {"batch_1": {"p50_ms": 2.5, "p99_ms": None}}


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """Runs with a teacher, its student, their graph, a report that also measured a stranger, and the bundle."""
    runs = tmp_path_factory.mktemp("runs")
    prepare_dataset([write_log(runs / "log.txt", num_items=40, num_users=60)], runs / "data", DataConfig())
    data = load_dataset(runs / "data")
    began = {"backbone": "smollm2-135m", "backbone_hash": "ab" * 32, "num_layers": 8}
    parents = {"data": data.artifact}
    for name, stage, settings in (
        ("stranger", "prune", {}),
        ("teacher", "train-teacher", began),
        ("student", "distill", {"num_layers": 3, "loss": "paper"}),
    ):
        if name == "student":
            parents = parents | {"teacher": open_artifact(runs / "teacher")}
        with publish(runs / name, Stage(name=stage, kind="checkpoint", settings=settings, parents=parents)) as folder:
            save_checkpoint(folder, tiny_model(prompt="none", num_items=data.num_items))
            data.items.save(folder)
    graph, _ = export_checkpoint(open_artifact(runs / "student"), data, runs / "export", ExportConfig())
    row = {"name": "x", "artifact": "export", "hash": graph.hash, "accuracy": ACCURACY, "latency": LATENCY}
    measured = {"graph": graph, "stranger": open_artifact(runs / "stranger")}
    with publish(runs / "report", Stage(name="benchmark", kind="report", settings={}, parents=measured)) as folder:
        write_json(folder / "benchmark.json", {"rows": [row], "dataset": {}})
    bundle(graph, data, runs / "bundle", report=runs / "report")
    return runs


def document(folder):
    return json.loads((folder / MLBOM_FILE).read_text())


def require_valid(folder):
    found = JsonStrictValidator(SchemaVersion.V1_6).validate_str((folder / MLBOM_FILE).read_text())
    assert found is None, found


def properties(component):
    return {one["name"].removeprefix("slmcompress:"): one["value"] for one in component["properties"]}


def test_the_document_is_valid_and_a_change_of_its_kind_is_not(made, tmp_path):
    require_valid(made / "bundle")
    wrong = document(made / "bundle")
    wrong["metadata"]["component"]["modelCard"]["metrics"] = []
    (tmp_path / MLBOM_FILE).write_text(json.dumps(wrong))
    with pytest.raises(AssertionError, match="metrics"):
        require_valid(tmp_path)


def test_every_file_that_answers_is_named_with_the_manifests_hash(made):
    listed = {
        file["name"]: file["hashes"][0]["content"]
        for file in document(made / "bundle")["metadata"]["component"]["components"]
    }
    manifest = open_artifact(made / "bundle").manifest["files"]
    assert listed == {name: manifest[name]["sha256"] for name in listed}
    assert {"model.onnx", "model.onnx.data", "items.onnx.data", "items.parquet", "signature.json"} <= set(listed)
    assert {"rerank.onnx", "append.onnx", "item_projection.npz"} <= set(listed)


def test_it_is_covered_by_checksums_and_shown_by_diff(made, tmp_path):
    assert f"  {MLBOM_FILE}\n" in (made / "bundle" / "SHA256SUMS").read_text()
    verify(made / "bundle")
    other, _ = bundle(open_artifact(made / "export"), load_dataset(made / "data"), tmp_path / "bundle")
    changed = {one.name for one in differences(open_artifact(made / "bundle"), other) if one.what == "files"}
    assert changed == {MLBOM_FILE, "README.md", "benchmark.json"}


def test_the_pedigree_is_the_line_of_models_and_nobody_who_was_only_measured(made):
    ancestors = document(made / "bundle")["metadata"]["component"]["pedigree"]["ancestors"]
    assert [one["name"] for one in ancestors] == ["smollm2-135m", "train-teacher", "distill", "export"]
    assert ancestors[0]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert properties(ancestors[2])["hash"] == open_artifact(made / "student").hash
    assert (properties(ancestors[2])["num_layers"], properties(ancestors[2])["loss"]) == ("3", "paper")


def test_the_dataset_is_named_with_its_files_and_the_card_points_to_it(made):
    found = document(made / "bundle")
    [data] = [one for one in found["components"] if one["type"] == "data"]
    assert data["components"] == [
        {"type": "file", "name": "log.txt", "hashes": [{"alg": "SHA-256", "content": file_sha256(made / "log.txt")}]}
    ]
    assert properties(data)["hash"] == open_artifact(made / "data").hash
    assert found["metadata"]["component"]["modelCard"]["modelParameters"]["datasets"] == [{"ref": data["bom-ref"]}]


def test_a_named_data_set_has_its_licence_and_a_backbone_elsewhere_keeps_its_folder_to_itself(made):
    source, files = SOURCES["ml-100k"], list(SOURCES["ml-100k"].files.items())
    inputs = {"files": [list(files[0])], "items_file": list(files[1])}
    lineage = [
        {"stage": "data", "kind": "dataset", "hash": "1" * 64, "settings": {"inputs": inputs}},
        {"stage": "import-teacher", "kind": "checkpoint", "hash": "2" * 64, "settings": {"backbone": "/home/me/llama"}},
    ]
    graph = open_artifact(made / "export")
    found = ml_bom(made / "bundle", Artifact(graph.path, {**graph.manifest, "lineage": lineage}), None)
    [data] = [one for one in found["components"] if one["type"] == "data"]
    assert (data["name"], data["licenses"]) == ("ml-100k", [{"license": {"name": source.licence}}])
    assert [one["name"] for one in data["components"]] == ["ml-100k.inter", "ml-100k.item"]
    backbone = found["metadata"]["component"]["pedigree"]["ancestors"][0]
    assert (backbone["name"], "licenses" in backbone, "/home" in json.dumps(found)) == ("llama", False, False)
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(json.dumps(found)) is None


def test_figures_are_those_of_the_report_and_go_when_the_catalogue_changes(made, tmp_path):
    card = document(made / "bundle")["metadata"]["component"]["modelCard"]
    metrics = {one["type"]: one for one in card["quantitativeAnalysis"]["performanceMetrics"]}
    assert {name: one["value"] for name, one in metrics.items()} == {
        "hr@1": "0.25000", "ndcg@10": "0.50000", "p50_ms": "2.50"
    }  # fmt: skip
    assert metrics["ndcg@10"]["confidenceInterval"] == {"lowerBound": "0.40000", "upperBound": "0.60000"}
    (tmp_path / "gone.txt").write_text("5\n")
    updated, old = tmp_path / "new", open_artifact(made / "bundle")
    update_items(old, updated, items=None, retire=tmp_path / "gone.txt")
    verify(updated)
    require_valid(updated)
    model = document(updated)["metadata"]["component"]
    assert "quantitativeAnalysis" not in model["modelCard"]
    assert [one["name"] for one in model["pedigree"]["ancestors"]][-2:] == ["export", "bundle"]
    assert model["version"] != document(made / "bundle")["metadata"]["component"]["version"]
    stages = [entry["stage"] for entry in model_lineage(open_artifact(updated))]
    assert stages == ["data", "train-teacher", "distill", "export", "bundle", "update-items"]


def test_the_required_packages_are_those_that_answering_loads(made):
    script = f"""
import sys
from pathlib import Path
from export.runtime import OnnxRecommender
from slmrec.catalogue import load_catalogue
folder = Path({str(made / "bundle")!r})
OnnxRecommender(folder), load_catalogue(folder)
print(*{{name.partition(".")[0] for name in sys.modules}})
"""
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    libraries = {one["name"]: one for one in document(made / "bundle")["components"] if one["type"] == "library"}
    required = {name for name, one in libraries.items() if one["scope"] == "required"}
    assert required == set(NEEDED)
    assert required - {"slmcompress"} == (set(libraries) | {"jaxtyping", "psutil", "pyarrow"}) & set(loaded)
    assert libraries["torch"]["version"] == library_versions()["torch"]
    assert document(made / "bundle")["dependencies"][0]["dependsOn"] == ["python", *sorted(
        libraries[name]["bom-ref"] for name in NEEDED
    )]  # fmt: skip


def test_the_same_inputs_give_the_same_document_and_others_another_serial_number(made, tmp_path):
    data, graph = load_dataset(made / "data"), open_artifact(made / "export")
    for name in ("first", "second"):
        bundle(graph, data, tmp_path / name, report=made / "report")
    first, second = ((tmp_path / name / MLBOM_FILE).read_bytes() for name in ("first", "second"))
    assert first == second == (made / "bundle" / MLBOM_FILE).read_bytes()
    bundle(graph, data, tmp_path / "unmeasured")
    assert document(tmp_path / "unmeasured")["serialNumber"] != document(made / "bundle")["serialNumber"]


def test_yesterdays_bundle_has_none_and_gets_one_when_it_changes(tmp_path):
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    assert not (tmp_path / "bundle" / MLBOM_FILE).exists()
    verify(tmp_path / "bundle")
    (tmp_path / "gone.txt").write_text("5\n")
    made, _ = update_items(
        open_artifact(tmp_path / "bundle"), tmp_path / "new", items=None, retire=tmp_path / "gone.txt"
    )
    require_valid(made.path)


def test_the_model_card_is_read_by_the_hubs_own_reader(made):
    card = ModelCard.load(made / "bundle" / "README.md")
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "hr@1": 0.25, "ndcg@10": 0.5
    }  # fmt: skip
    assert card.data.library_name == "onnxruntime"
    assert MLBOM_FILE in card.text
    assert card.text.endswith("* log.txt: unknown\n* smollm2-135m: Apache-2.0\n")
    assert "engine" not in card.text.lower()
    assert OnnxRecommender(made / "bundle").num_items == 40

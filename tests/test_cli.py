"""The console script: quick help, exit codes, and messages instead of tracebacks."""

import json
import os
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "polars", "numpy", "pyarrow", "matplotlib", "rich")


def slmcompress(*arguments, cwd=None, env=None):
    command = [sys.executable, "-c", "from slmrec.cli.main import run; run()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=env)


def test_help_loads_nothing_heavy():
    script = (
        "import sys; from slmrec.cli.main import main\n"
        "main(['--help'], standalone_mode=False)\n"
        f"print('LOADED', [name for name in {HEAVY} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("LOADED []\n")


@pytest.mark.parametrize(
    "command",
    ["demo", "doctor", "data", "train-items", "train-teacher", "import-teacher", "distill", "prune", "quantize",
     "sensitivity", "importance", "export", "evaluate", "benchmark", "compare", "bundle", "verify", "recommend",
     "diff", "serve", "tune"],
)  # fmt: skip
def test_every_command_of_the_contract_has_help(command):
    result = slmcompress(command, "--help")
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout


def test_the_stages_stand_in_the_help_as_they_are_typed():
    assert "\n    slmcompress data ml-100k      slmcompress distill\n" in slmcompress("--help").stdout


@pytest.mark.parametrize("runs", [["--runs", "here"], ["demo", "--runs", "here"], ["SLMCOMPRESS_RUNS=here"]])
def test_the_demo_works_below_the_folder_that_was_asked_for(tmp_path, runs):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "data").write_text("in the way")
    env = {**os.environ, "SLMCOMPRESS_RUNS": "here"} if "=" in runs[0] else None
    arguments = [a for a in runs if "=" not in a and a != "demo"]
    before, after = ([], arguments) if "demo" in runs else (arguments, [])
    result = slmcompress(*before, "demo", "--synthetic", *after, cwd=tmp_path, env=env)
    assert result.returncode != 0
    assert "here/data" in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_demo_can_be_run_again(tmp_path):
    for _ in range(2):
        result = slmcompress("demo", "--synthetic", "--runs", tmp_path / "demo", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert "(verified)" in result.stderr + result.stdout


def test_an_output_of_dot_is_the_folder_one_stands_in(tmp_path):
    (tmp_path / "a.csv").write_text("user,item,timestamp\n" + "".join(f"u,{n},{n}\n" for n in range(4)))
    result = slmcompress("data", "a.csv", "-o", ".", cwd=tmp_path)
    assert (result.returncode, "was not made by slmcompress" in result.stderr) == (2, True)


def test_a_file_in_the_way_of_an_output_is_a_message(tmp_path):
    (tmp_path / "plain").write_text("x")
    (tmp_path / "a.csv").write_text("user,item,timestamp\n" + "".join(f"u,{n},{n}\n" for n in range(4)))
    result = slmcompress("data", "a.csv", "-o", "plain/data", cwd=tmp_path)
    assert (result.returncode, "Traceback" in result.stderr) == (2, False)
    assert "a file stands in its way" in result.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [({"WORLD_SIZE": "abc"}, "no number"), ({"WORLD_SIZE": "2"}, "data is one process's work, but 2 were started")],
)
def test_a_launcher_that_says_nonsense_is_a_message(tmp_path, variables, message):
    result = slmcompress("data", "a.csv", cwd=tmp_path, env={**os.environ, **variables})
    assert (result.returncode, message in result.stderr, "Traceback" in result.stderr) == (2, True, False)


def test_an_error_is_a_message_a_remedy_and_exit_code_2(tmp_path):
    result = slmcompress("distill", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Error: runs/teacher does not exist" in result.stderr
    assert "Try: slmcompress train-teacher" in result.stderr
    assert "Traceback" not in result.stderr


def test_not_found_lists_what_there_is(tmp_path):
    from slmrec.artifact import Stage, publish

    with publish(tmp_path / "runs" / "mine", Stage(name="train-teacher", kind="checkpoint", settings={})):
        pass
    assert "there is: runs/mine" in slmcompress("distill", cwd=tmp_path).stderr


def test_a_flag_that_does_not_exist_is_click_s_own_error(tmp_path):
    assert slmcompress("distill", "--nonsense", cwd=tmp_path).returncode == 2


def test_a_config_file_sets_flags_and_the_command_line_wins(tmp_path):
    (tmp_path / "c.toml").write_text("num-layers = 3\nnum-blocks = 4\n")
    result = slmcompress("distill", "-c", "c.toml", cwd=tmp_path)
    assert "num_layers=3 cannot be cut into num_blocks=4" in result.stderr
    assert result.returncode == 2
    assert "num_layers=2 cannot" in slmcompress("distill", "-c", "c.toml", "--num-layers", "2", cwd=tmp_path).stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("depth = 3", "no flag of distill"), ("= 3", "is not TOML"), ("num-layers = 2.5", "sets num-layers to 2.5"),
        ("num-layers = true", "sets num-layers to True"), ("k = 3", "learning-rate"),
        ("epochs = [1, 2]", "sets epochs to [1, 2], a value of another type"),
        ("patience = 2020-01-01", "expected is text or a number"), ("share-prefix = 0", "expected is true or false"),
        ("output = 5", "sets output to 5, a value of another type"), ("model = ['a', 'b']", "sets model to ['a', 'b']"),
        ("data = {a = 1}", "expected is text or a number"), ("init = 'foo'", "sets init to 'foo': 'foo' is not one of"),
        ("config = 'd.toml'", "no flag of distill"), ("runs = 3", "sets runs to 3"),
    ],
)  # fmt: skip
def test_a_bad_config_file_is_refused(tmp_path, text, message):
    (tmp_path / "c.toml").write_text(text)
    result = slmcompress("distill", "-c", "c.toml", cwd=tmp_path)
    assert (result.returncode, message in result.stderr) == (2, True)


def test_a_full_disk_is_a_message(tmp_path):
    script = (
        "import errno, slmrec.cli.main as m\n"
        "def full(*_, **__): raise OSError(errno.ENOSPC, 'No space left on device', 'runs/student')\n"
        "m.main = full\n"
        "m.run()"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "No space left on device: runs/student" in result.stderr
    assert "Try: free some disk space" in result.stderr


def test_a_foreign_package_named_compress_is_noticed(tmp_path):
    (tmp_path / "compress").mkdir()
    (tmp_path / "compress" / "__init__.py").write_text("")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from slmrec.cli.main import run; run()"
    result = subprocess.run([sys.executable, "-c", script, "doctor"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "not the one of slmcompress" in result.stderr


def test_doctor_tells_what_is_absent_from_what_is_missing():
    script = (
        "import sys; sys.modules['ray'] = sys.modules['onnxruntime'] = None; from slmrec.cli.main import run; run()"
    )
    for device in ("cpu", "cuda"):
        call = [sys.executable, "-c", script, "doctor", "--json", "--device", device]
        result = json.loads(subprocess.run(call, capture_output=True, text=True, check=True).stdout)
        found = {one["name"]: one for one in result["findings"]}
        assert (found["ray"]["ok"], found["ray"]["absent"]) == (True, True)
        assert "slmcompress[ray]" in found["ray"]["remedy"]
        assert (found["onnxruntime"]["ok"], result["ok"]) == (False, False)
        assert (found["cryptography"]["absent"], found["torch"]["absent"]) == (False, False)
        assert found["GPU"]["ok"] == (device == "cpu" or not found["GPU"]["absent"])

"""The documentation's commands are run as typed, on small stand-ins of what they are typed for; the rest is parsed.

A block marked ```bash or ```console is run, in the order of its page. A block marked `no-run: reason` is not, for the
reason that stands there; its slmcompress lines must still be commands and options that exist, with values that convert.
In a console block lines after `$` are run, and what follows must come back: numbers may be others, `...` leaves out.
"""

import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from published import write_backbone

from slmrec.artifact import open_artifact
from slmrec.cli.main import main
from slmrec.sources import SOURCES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "cli.md")]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALL = {
    "train-items": {"epochs": 3},
    "train-teacher": {"epochs": 1, "precision": "fp32"},
    "distill": {"epochs": 1, "precision": "fp32"},
    "prune": {"precision": "fp32"},
    "quantize": {"accuracy_gate": 0.5},
    "benchmark": {"rounds": 20, "batch_rounds": 2, "memory": False, "floor": False},
}
"""Defaults in place of the usual ones; what a page sets itself stays as it stands there."""


@dataclass(frozen=True)
class Block:
    """A fenced block of commands."""

    page: str
    language: str
    reason: str
    """Why it is not run; empty where it is."""
    text: str

    def commands(self):
        """(command, what must come back or None), continued lines and here-documents in one."""
        found = []
        text = self.text.replace("\\\n", " ")
        if self.language == "console":
            for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                command, _, output = part.partition("\n")
                found.append((command, output.splitlines()))
            return found
        lines = re.findall(r"^[^\n]*<<'END'\n.*?^END$|^[^\n]+$", text, re.MULTILINE | re.DOTALL)
        return [(line, None) for line in lines]


def blocks(page):
    """The blocks of commands on a page, in order."""
    found = []
    for marked, text in FENCE.findall(page.read_text()):
        language, _, reason = marked.partition(" no-run: ")
        if language.split(" ")[0] in ("bash", "console", "sh", "shell"):
            found.append(Block(page.name, language, reason, text))
    return found


def slmcompress_lines(text):
    """The words of every slmcompress command of a text, started by itself or by a launcher."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in line.removeprefix("$ ").split("&&") if "slm" in line else ():
            words = [word for word in shlex.split(part, comments=True) if word != "&"]
            if words[:1] == ["slmcompress"]:
                yield words[1:]
            elif "slmrec.cli.main" in words:
                yield words[words.index("slmrec.cli.main") + 1 :]


def require_parsed(words):
    """The line as click reads it, nothing run.

    Raises:
        click.UsageError: a command or option that does not exist, or a value that does not convert.
    """
    group = click.Context(main, info_name="slmcompress")
    _, rest, _ = main.make_parser(group).parse_args(list(words))
    name, command, rest = main.resolve_command(group, rest)
    command.make_context(name, rest, parent=group)


def same_but_for_numbers(line):
    """The line with # for every number and hash, and without spaces."""
    hashed = re.sub(r"\b[0-9a-f]{12,}\b", "#", line)
    return re.sub(r"\s+", "", re.sub(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?", "#", hashed))


class Reader:
    """Somebody who types what the pages say, in one folder."""

    def __init__(self, folder):
        self.folder, self.servers = folder, []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def read(self, page):
        """Run every block of a page that can be run."""
        for block in blocks(page):
            for command, output in block.commands() if not block.reason else ():
                said = "\n".join(self.type(part.strip()) for part in self.parts(command))
                if output is not None:
                    require_said(command, output, said)

    def parts(self, command):
        return [command] if "<<" in command else command.split("&&")

    def type(self, command):
        """What one command prints; it must end with 0."""
        command = command.replace("8000", str(self.port))
        words = [] if "<<" in command else shlex.split(command, comments=True)
        if not words and "<<" not in command:
            return ""
        if words[:2] == ["slmcompress", "serve"]:
            return self.serve(words[1:-1])
        if words[:1] == ["curl"]:
            return self.ask(words[1:])
        if words[:1] == ["kill"]:
            return self.end()
        if words[:1] == ["slmcompress"]:
            result = CliRunner().invoke(main, words[1:], standalone_mode=False, default_map=SMALL)
            assert result.exception is None, f"{command}: {result.exception!r}"
            return result.output
        path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        made = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=os.environ | path, capture_output=True, text=True, check=False
        )
        assert made.returncode == 0, f"{command}: {made.stderr}"
        return made.stdout

    def serve(self, arguments):
        """Start the server and wait for it; what the pages type after it is asked of it."""
        command = [sys.executable, "-m", "slmrec.cli.main", *arguments, "--port", str(self.port)]
        self.servers.append(subprocess.Popen(command, cwd=self.folder, stderr=subprocess.PIPE, text=True))
        for _ in range(600):
            assert self.servers[-1].poll() is None, self.servers[-1].communicate()[1]
            try:
                return self.ask([f"http://127.0.0.1:{self.port}/v2/health/ready"])
            except urllib.error.URLError:
                time.sleep(0.1)
        raise AssertionError("the server does not start")

    def ask(self, words):
        """`curl [-s] [-d DATA] URL`."""
        words = [word for word in words if word != "-s"]
        data = words.pop(words.index("-d") + 1).encode() if "-d" in words else None
        with urllib.request.urlopen(words[-1], data=data, timeout=30) as answer:
            return answer.read().decode()

    def end(self):
        """SIGTERM for all servers: they must end with 0."""
        for server in self.servers:
            server.terminate()
        codes = [(server.wait(timeout=30), server.stderr.close())[0] for server in self.servers]
        self.servers = []
        assert not any(codes), codes
        return ""


def require_said(command, expected, said):
    """Every line of a page's output is one of the lines that came back, in this order."""
    lines = iter([same_but_for_numbers(line) for line in said.splitlines()])
    for line in (line for line in expected if line.strip() not in ("", "...")):
        wanted = same_but_for_numbers(line)
        assert any(wanted in found for found in lines), f"$ {command}\nnever said: {line}\nsaid:\n{said}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache in which the named data set and the named backbone are tiny ones: everybody walks around a circle."""
    folder = tmp_path_factory.mktemp("cache")
    data, model = (folder / f"{SOURCES[name].name}-{SOURCES[name].sha256[:12]}" for name in ("ml-100k", "smollm2-135m"))
    write_backbone(model.with_name(model.name + "-fp32"), num_layers=30, hidden=32)
    data.mkdir()
    items = [*range(1, 59), 172, 200]
    events = [
        f"{user}\t{items[(7 * user + step) % 60]}\t5\t{1000 * user + step}"
        for user in range(1, 61)
        for step in range(6 + user % 13)
    ]
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    (data / "ml-100k.inter").write_text("\n".join([header, *events]) + "\n")
    titles = [f"{item}\t{ {1: 'Toy Story', 7: 'Twelve Monkeys'}.get(item, f'Film {item}') }" for item in items]
    (data / "ml-100k.item").write_text("\n".join(["item_id:token\tmovie_title:token_seq", *titles]) + "\n")
    return folder


@pytest.fixture(scope="module")
def readme(cache, tmp_path_factory):
    """Where somebody has typed what the README says; the other pages go on from its artefacts."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLMCOMPRESS_CACHE", str(cache))
        patch.delenv("SLMCOMPRESS_RUNS", raising=False)
        patch.chdir(folder)
        Reader(folder).read(ROOT / "README.md")
    return folder


@pytest.fixture
def reader(cache, tmp_path, monkeypatch):
    """Somebody in an empty folder."""
    monkeypatch.setenv("SLMCOMPRESS_CACHE", str(cache))
    monkeypatch.delenv("SLMCOMPRESS_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)
    reader = Reader(tmp_path)
    yield reader
    reader.end()


def test_the_readmes_stages_run_as_typed_one_after_the_other(readme):
    made = {path.name for path in (readme / "runs").iterdir() if not path.name.startswith(".")}
    assert {"data", "items", "teacher", "student", "student-pruned-int8", "export", "report", "bundle"} <= made


OTHERS = [page for page in PAGES if page.name not in ("README.md", "tutorial.md")]


@pytest.mark.parametrize("page", OTHERS, ids=lambda page: page.name)
def test_a_pages_commands_run_after_the_readmes(readme, reader, page):
    shutil.copytree(readme / "runs", reader.folder / "runs")
    reader.read(page)


def test_the_tutorial_runs_from_an_empty_folder(reader):
    reader.read(ROOT / "docs" / "tutorial.md")
    assert open_artifact(reader.folder / "runs" / "bundle").kind == "bundle"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_exists_with_its_options(page):
    text = page.read_text()
    for block in blocks(page):
        for words in slmcompress_lines(block.text):
            require_parsed(words)
    for inline in re.findall(r"`slmcompress ([^`]+)`", FENCE.sub("", text)):
        with contextlib.suppress(click.MissingParameter):  # prose may name a command without what it is given
            require_parsed(shlex.split(inline))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_stand_in_fences_and_what_is_not_run_says_why(page):
    text = page.read_text()
    for marked in re.findall(r"^```([^\n]+)$", text, re.MULTILINE):
        assert re.fullmatch(r"text|python|json|toml|yaml|(bash|console)( no-run: \w[^`]+)?", marked), (
            f"{page.name}: {marked}"
        )
    loose = re.findall(r"^(?: {4}|\t)(?!\s).*$", FENCE.sub("", text), re.MULTILINE)
    assert not loose, f"{page.name} has commands outside of fences: {loose}"


@pytest.mark.parametrize(
    "line",
    ["slmcompress distil", "slmcompress distill --num-layer 2", "slmcompress distill --num-layers two",
     "slmcompress data", "make x && slmcompress export --precision int4", "accelerate launch -m slmrec.cli.main prun"],
)  # fmt: skip
def test_a_line_that_has_rotted_is_noticed(line):
    [words] = slmcompress_lines(line)
    with pytest.raises(click.UsageError):
        require_parsed(words)


def test_an_output_that_has_changed_is_noticed():
    require_said(
        "x", ["runs/data: data, 0.1 MB", "...", "verified"], "using y\nruns/data: data, 22.5 MB\nz\nverified\n"
    )
    with pytest.raises(AssertionError, match="never said: certified"):
        require_said("x", ["certified"], "runs/data: data, 22.5 MB\nverified\n")

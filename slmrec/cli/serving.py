"""slmcompress serve."""

import logging
import os
from pathlib import Path
from typing import Any

import click

from slmrec.cli.options import common_options, runs_folder, say
from slmrec.errors import ConfigError

TOKEN_VARIABLE = "SLMCOMPRESS_TOKEN"


@click.command()
@click.argument("path", metavar="BUNDLE", required=False, type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Loopback unless told otherwise: no encryption.")
@click.option("--port", type=int, default=8000, show_default=True, help="0 chooses a free one.")
@click.option("--max-batch", type=int, default=64, show_default=True, help="Users computed together.")
@click.option("--max-queue", type=int, default=1024, show_default=True, help="Users that may wait; then 429.")
@click.option("--timeout-s", type=float, default=5.0, show_default=True, help="Longest wait for an answer; then 504.")
@click.option("--max-body-bytes", type=int, default=4 * 2**20, show_default=True, help="Longest request; then 413.")
@click.option("--max-ids", type=int, default=10_000, show_default=True, help="Longest list of ids; then 400.")
@click.option("--state-mb", type=float, default=0.0, show_default=True, help="Memory for users who come back.")
@click.option("--threads", type=int, default=0, show_default=True, help="Of ONNX Runtime; 0 = the cores there are.")
@click.option("--watch-s", type=float, default=0.0, show_default=True, help="Look for another bundle; or SIGHUP.")
@click.option("--key", type=click.Path(path_type=Path), help="Public Ed25519 key that bundles must be signed with.")
@click.option("--token-file", type=click.Path(path_type=Path), help=f"Bearer token  [default: ${TOKEN_VARIABLE}]")
@common_options
def serve(
    path: Path | None, key: Path | None, token_file: Path | None, device: str, seed: int, as_json: bool, force: bool,
    **settings: Any,
) -> None:  # fmt: skip
    """Serve a BUNDLE over HTTP: Open Inference Protocol v2, and POST /recommend with external ids.

    The bundle is verified first. SIGHUP (or --watch-s) takes over another bundle at the same path, such as a link that
    now leads elsewhere; if it does not verify, the old one goes on. SIGTERM answers what was accepted and ends.
    """
    try:
        import uvloop

        from export.server import Server, listen, run
    except ImportError as error:
        raise ConfigError(f"serving needs {error.name}", remedy="pip install 'slmcompress[serve]'") from None
    from slmrec.serve_config import ServeConfig

    if device == "cuda":
        raise ConfigError("bundles are served by processors here", remedy="leave out --device; Triton serves engines")
    config = ServeConfig(**settings)
    if path is None:
        path = runs_folder() / "bundle"
        say(f"using {path}")
    server = Server(path, config, key=key, token=_token(token_file))
    server.now = server.load()
    listener = listen(config)  # nobody waits for what is not loaded yet
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    say(f"serving {path.resolve()} on http://{config.host}:{listener.getsockname()[1]}")
    uvloop.run(run(server, listener))


def _token(file: Path | None) -> bytes | None:
    """The token of the file or of the environment; never of the command line, which others can read."""
    if file is not None:
        try:
            token = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} cannot be read: {error}", remedy="a file with one line") from None
        if token.split() != [token]:
            raise ConfigError(f"{file} is empty, or holds more than one word", remedy="a file with one line")
        return token.encode()
    return os.environ[TOKEN_VARIABLE].encode() if os.environ.get(TOKEN_VARIABLE) else None

"""slmcompress: a trained LLM recommender in, a small, fast and verified one out."""

import errno
import importlib.util
import sys
from pathlib import Path
from typing import NoReturn

import click

from slmrec.cli import artifacts, bench, data, demo, distilling, doctor, importing, serving, shrinking, train, tuning
from slmrec.errors import ConfigError, SlmrecError
from slmrec.processes import leave, leave_the_message_to_the_main_process, process_count

MACHINE_FAULTS = {
    errno.ENOSPC: "free some disk space, or another --output or --runs",
    errno.EDQUOT: "free some disk space, or another --output or --runs",
    errno.EACCES: "a folder you may write to (--output or --runs)",
    errno.EEXIST: "another --output or --runs: a file stands in its way",
    errno.ENOTDIR: "another --output or --runs: a file stands in its way",
    errno.ENAMETOOLONG: "a shorter name",
    errno.EROFS: "a folder you may write to (--output or --runs)",
}

MANY_PROCESSES = ("train-items", "train-teacher", "distill")
"""Commands that `accelerate launch` may start on many devices; all others are one process's work."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="slmcompress")
@click.option(
    "--runs",
    type=click.Path(path_type=Path),
    help="Folder of default inputs and outputs  [default: $SLMCOMPRESS_RUNS or ./runs]",
)
def main(runs: Path | None) -> None:
    """Distil, quantize and export an LLM recommender, and measure accuracy against latency.

    The stages work as typed, one after the other:

    \b
      slmcompress data ml-100k      slmcompress distill
      slmcompress train-items       slmcompress quantize --bits 8
      slmcompress train-teacher     slmcompress export

    or all of them at once: slmcompress demo
    """  # noqa: D301 - click takes the control character for "leave these lines as they are"
    command = click.get_current_context().invoked_subcommand
    if process_count() > 1 and command not in MANY_PROCESSES:
        raise ConfigError(
            f"{command} is one process's work, but {process_count()} were started",
            remedy=f"slmcompress {command}, without accelerate launch",
        )


for command in (
    demo.demo, doctor.doctor, data.data, train.train_items, train.train_teacher, importing.import_teacher,
    distilling.distill, shrinking.importance, shrinking.prune, shrinking.sensitivity, shrinking.quantize,
    artifacts.export, artifacts.bundle, artifacts.update_items, artifacts.verify,
    artifacts.recommend, bench.evaluate, bench.benchmark, tuning.tune, bench.compare, bench.diff, serving.serve,
):  # fmt: skip
    main.add_command(command)


def _end(code: int) -> NoReturn:
    leave(code)
    sys.exit(code)


def run() -> None:
    """The console script: errors a user can act on end with their message and exit code 2, Ctrl-C with 130.

    Of many processes that all fail alike, the main one alone says so.
    """
    try:
        _require_own_siblings()
        main(standalone_mode=False)
        leave()
    except click.exceptions.Abort:
        click.echo("interrupted; nothing is lost, the same command goes on", err=True)
        _end(130)
    except KeyboardInterrupt:
        click.echo("interrupted; nothing is lost, the same command goes on", err=True)
        _end(130)
    except click.ClickException as error:
        leave_the_message_to_the_main_process()
        error.show()
        _end(error.exit_code)
    except SlmrecError as error:
        leave_the_message_to_the_main_process()
        click.echo(f"Error: {error}", err=True)
        _end(2)
    except OSError as error:
        remedy = MACHINE_FAULTS.get(error.errno or 0)
        if remedy is None:
            raise
        leave_the_message_to_the_main_process()
        where = error.filename2 or error.filename or "while writing"
        click.echo(f"Error: {error.strerror}: {where}\nTry: {remedy}", err=True)
        _end(2)


def _require_own_siblings() -> None:
    """`compress` and `export` are common names: another distribution may have put its own before ours."""
    home = Path(__file__).resolve().parents[2]
    for name in ("compress", "export"):
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin is None or origin.parent.parent != home:
            raise ConfigError(
                f"the package {name!r} is {origin or 'missing'}, not the one of slmcompress in {home}",
                remedy="a virtual environment of its own for slmcompress",
            )


if __name__ == "__main__":
    run()

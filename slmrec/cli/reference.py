"""`python -m slmrec.cli.reference > docs/cli.md`: every command's help as one page."""

import click

from slmrec.cli.main import main

WIDTH = 110
HEAD = (
    "# Commands\n\nMade by `python -m slmrec.cli.reference > docs/cli.md`; a test fails where it says something else.\n"
)


def reference() -> str:
    """The page."""
    parts = [HEAD, _help(main, "slmcompress")]
    parts += [_help(command, f"slmcompress {name}") for name, command in main.commands.items()]
    return "\n".join(parts)


def _help(command: click.Command, name: str) -> str:
    names = main.context_settings["help_option_names"]
    context = click.Context(
        command, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH, help_option_names=names
    )
    lines = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    return f"## {name}\n\n```text\n{lines}\n```\n"


if __name__ == "__main__":
    print(reference(), end="")

"""Progress of long work, on stderr, so that stdout stays for results."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar(Protocol):
    """Something that shows how far the work is."""

    def __call__(self, advance: int, note: str = "") -> None:
        """Move on by `advance` units and show a note, such as the loss."""


@contextmanager
def progress_bar(title: str, total: int, *, done: int = 0) -> Iterator[Bar]:
    """A bar over `total` units of which `done` were done before (a resumed run)."""
    columns = [
        TextColumn("{task.description:<14}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    ]  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=2) as progress:
        task = progress.add_task(title, total=total, completed=done, note="")

        def advance(units: int, note: str = "") -> None:
            progress.update(task, advance=units, **({"note": note} if note else {}))

        yield advance

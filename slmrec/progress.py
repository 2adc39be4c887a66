"""Progress of long work, on stderr, so that stdout stays for results."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from slmrec.processes import is_main_process

Bar = Callable[..., None]
"""Called with the units done since the last call and, optionally, a note such as the loss."""


@contextmanager
def progress_bar(title: str, total: int, *, done: int = 0) -> Iterator[Bar]:
    """A bar over `total` units of which `done` were done before (a resumed run); the main process's alone is shown."""
    columns = [
        TextColumn("{task.description:<14}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    ]  # fmt: skip
    console = Console(stderr=True, quiet=not is_main_process())
    if 0 < done < total:
        console.print(f"{title}: goes on after {done} of {total}", highlight=False)
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        task = progress.add_task(title, total=total, completed=done, note="")

        def advance(units: int, note: str = "") -> None:
            progress.update(task, advance=units)
            if note:
                progress.update(task, note=note)

        yield advance

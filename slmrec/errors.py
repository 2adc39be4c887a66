"""Errors a user can act on: what was found, what was expected, and what to try."""

from collections.abc import Callable
from functools import partial


class SlmrecError(Exception):
    r"""A problem the user can solve; the command line prints it without a traceback and exits with 2.

    >>> str(SlmrecError("runs/teacher is empty", remedy="slmcompress train-teacher"))
    'runs/teacher is empty\nTry: slmcompress train-teacher'
    """

    def __init__(self, problem: str, *, remedy: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}\nTry: {self.remedy}"

    def __reduce__(self) -> tuple[Callable[[str], "SlmrecError"], tuple[str]]:
        """How it travels to another process: an exception would forget its keyword."""
        return partial(type(self), remedy=self.remedy), (self.problem,)


class ConfigError(SlmrecError):
    """Settings that cannot be carried out, alone or together."""


class DataError(SlmrecError):
    """Input data that is missing, malformed or empty."""


class ArtifactError(SlmrecError):
    """An artefact folder that is missing, altered, stale, or of another kind than expected."""


class TrainingError(SlmrecError):
    """Training that cannot go on, such as a loss that is no longer finite."""


class CheckError(SlmrecError):
    """A check that did not hold: parity of two artefacts, an accuracy gate, a bundle."""

"""Checks of settings that every dataclass of them shares."""

from slmrec.errors import ConfigError

LARGEST_SEED = 2**63 - 1
"""What every generator takes."""


def require(condition: bool, problem: str, remedy: str) -> None:
    """Refuse settings with a problem and what to try."""
    if not condition:
        raise ConfigError(problem, remedy=remedy)


def require_least(settings: object, **least: int) -> None:
    """Refuse a setting below its least value; None is no value."""
    for name, bound in least.items():
        value = getattr(settings, name)
        flag = "--" + name.replace("_", "-")
        require(value is None or value >= bound, f"{name}={value} is below {bound}", f"{flag} {bound} or more")


def require_most(settings: object, **most: int) -> None:
    """Refuse a setting above its largest value; None is no value."""
    for name, bound in most.items():
        value = getattr(settings, name)
        flag = "--" + name.replace("_", "-")
        require(value is None or value <= bound, f"{name}={value} is above {bound}", f"{flag} {bound} or less")


def require_seed(settings: object) -> None:
    """Refuse a seed that is no number of 63 bits."""
    require_least(settings, seed=0)
    require_most(settings, seed=LARGEST_SEED)


def is_unicode(text: str) -> bool:
    r"""Whether text can be written as UTF-8, which half of a surrogate pair cannot.

    >>> is_unicode("\u00e4"), is_unicode("\ud800")
    (True, False)
    """
    return not any("\ud800" <= character <= "\udfff" for character in text)


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a setting that is none of its choices."""
    require(value in choices, f"{name}={value!r} is not known", f"one of {', '.join(choices)}")

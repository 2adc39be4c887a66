"""Checks of settings that every dataclass of them shares."""

from slmrec.errors import ConfigError


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


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a setting that is none of its choices."""
    require(value in choices, f"{name}={value!r} is not known", f"one of {', '.join(choices)}")

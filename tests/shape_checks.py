"""The checker that every annotated function runs under in tests."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int where a float is annotated, as for mypy

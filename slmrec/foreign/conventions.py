"""What the E4SRec and SLMRec codes mean by their heads, table rows and histories; none of it is in their files."""

from dataclasses import dataclass, replace

from slmrec.errors import DataError
from slmrec.foreign.layouts import ForeignTeacher


@dataclass(frozen=True, kw_only=True)
class Convention:
    """How one code's tensors are to be read."""

    name: str
    head: str
    """tied or linear, as in `RecipeConfig`."""
    first_row: int
    """First row of the item table that is an item; what stands before it is padding."""
    masks_first_row: bool
    """Whether the item of row 0 is masked in histories, because 0 pads them as well."""
    positions: str
    max_history: int
    supervision: str
    """What it was trained on, and what its students are."""
    max_events: int | None = None
    """Newest events of a user that were trained on, the first of them no target; None = all."""
    may_lack_padding: bool = False
    """Whether a table of as many rows as there are items has no row of padding."""


E4SREC = Convention(
    name="E4SRec", head="linear", first_row=1, masks_first_row=False, positions="compact", max_history=50,
    supervision="prefixes", max_events=51,
)  # fmt: skip
"""`score` [num_items + 1, hidden] gives the scores; row 0 of it and of the item table is padding."""

SLMREC = Convention(
    name="SLMRec", head="tied", first_row=0, masks_first_row=True, positions="padded", max_history=30,
    supervision="last",
)  # fmt: skip
"""`score` [dim, hidden] projects the user vector, which is compared with the item table; every row is an item."""

HEADLESS = replace(E4SREC, name="headless", head="tied", may_lack_padding=True)
"""A decoder and an item table as wide as its states: items are read, and compared with the user vector, as they are."""


def convention_of(teacher: ForeignTeacher, num_items: int) -> Convention:
    """Whose head it is, by its shape; the catalogue decides where the item table is as wide as it is long.

    Raises:
        DataError: the head fits neither code.
    """
    if not teacher.heads:
        return HEADLESS
    rows, dim = teacher.table.shape
    outputs = len(teacher.heads["score.weight"])
    if outputs == dim and (outputs != rows or rows == num_items):
        return SLMREC
    if outputs == rows:
        return E4SREC
    raise DataError(
        f"score has {outputs} outputs: neither the {rows} rows of the item table (E4SRec) nor its width {dim} (SLMRec)",
        remedy="--table FILE with the item table the teacher was trained on",
    )

"""Figures of what compression would cost, for people: layers by their sensitivity, stretches by what they change."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")


def bars(values: Mapping[str, float], path: Path, *, label: str) -> None:
    """One horizontal bar per name, in the order given, as SVG and PNG."""
    figure, axes = _axes(7, 1.2 + 0.22 * len(values))
    names = list(values)
    axes.barh(range(len(names)), list(values.values()), color="#0072B2")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(label)
    _save(figure, path)


def heatmap(
    values: np.ndarray, path: Path, *, rows: Sequence[str], columns: Sequence[str], labels: Sequence[str]
) -> None:
    """A matrix with its figures in the cells; NaN is left blank. `labels` name the rows, the columns and the colour."""
    figure, axes = _axes(2.5 + 0.5 * len(columns), 1.5 + 0.4 * len(rows))
    image = axes.imshow(values, cmap="viridis", aspect="auto")
    middle = np.nanmean([np.nanmin(values), np.nanmax(values)])
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "white" if value < middle else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=labels[1], ylabel=labels[0])
    figure.colorbar(image, label=labels[2])
    _save(figure, path)


def _axes(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _save(figure: "Figure", path: Path) -> None:
    from matplotlib import rc_context

    for suffix in SUFFIXES:
        with rc_context({"svg.hashsalt": path.name}):  # equal figures are equal files
            figure.savefig(path.with_suffix(suffix), dpi=120, metadata={"Date": None} if suffix == ".svg" else None)

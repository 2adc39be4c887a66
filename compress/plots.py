"""Figures of what compression would cost, for people: layers by their sensitivity, stretches by what they change."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")
COLOURS = ("#0072B2", "#D55E00", "#009E73")


def bars(names: Sequence[str], series: Mapping[str, Sequence[float]], path: Path, *, label: str) -> None:
    """Horizontal bars in the order of the names, one of each series (three at most) side by side, as SVG and PNG."""
    figure, axes = _axes(7, 1.4 + 0.26 * len(names))
    thickness = 0.8 / len(series)
    for number, ((name, values), colour) in enumerate(zip(series.items(), COLOURS, strict=False)):
        places = np.arange(len(names)) + (number - (len(series) - 1) / 2) * thickness
        axes.barh(places, list(values), height=thickness, color=colour, label=name)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(label)
    figure.legend(frameon=False, loc="outside upper left", ncols=len(series))  # above: bars may end anywhere
    _save(figure, path)


def heatmap(
    values: np.ndarray, path: Path, *, rows: Sequence[str], columns: Sequence[str], labels: Sequence[str]
) -> None:
    """A matrix with its figures in the cells; NaN is left blank. `labels` name the rows, the columns and the colour."""
    figure, axes = _axes(2.5 + 0.5 * len(columns), max(3.4, 1.5 + 0.4 * len(rows)))  # room for the colour's label
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

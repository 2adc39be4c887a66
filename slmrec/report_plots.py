"""Plots as inline SVG: colours come from the page's CSS variables, so one drawing serves light and dark mode."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

LABEL_WIDTH, LABEL_HEIGHT = 7.7, 16
"""Pixels of a character and of a line of 12.5 px text, on the generous side."""


@dataclass(frozen=True)
class Point:
    """One artefact in the plot."""

    name: str
    kind: str
    latency_ms: float
    latency_p90_ms: float
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """One line of a small multiple; `shade` 1 is the strongest colour, towards 0 the faintest."""

    label: str
    points: Sequence[tuple[float, float]]
    shade: float = 1.0


@dataclass(frozen=True)
class Frame:
    """Where data values fall in a drawing; either axis may be logarithmic."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log_x: bool = False
    log_y: bool = False

    def x(self, value: float) -> float:
        """Pixels from the left."""
        low, high = self.x_range
        if self.log_x:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return round(self.left + (value - low) / (high - low) * (self.width - self.left - self.right), 1)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        low, high = self.y_range
        if self.log_y:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return round(
            self.height - self.bottom - (value - low) / (high - low) * (self.height - self.top - self.bottom), 1
        )


@dataclass(frozen=True)
class Box:
    """A rectangle that labels must not cover."""

    x: float
    y: float
    width: float
    height: float

    def meets(self, other: "Box") -> bool:
        """Whether the two share any area."""
        return (
            self.x < other.x + other.width
            and other.x < self.x + self.width
            and self.y < other.y + other.height
            and other.y < self.y + self.height
        )


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values within the range.

    >>> linear_ticks(0.0, 1.0, 5)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    rough = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten within the range.

    >>> log_ticks(0.9, 25)
    [1.0, 2.0, 5.0, 10.0, 20.0]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [round(multiple * 10.0**power, 12) for power in powers for multiple in (1, 2, 5)]
    return [value for value in values if low <= value <= high]


def pareto(points: Sequence[Point]) -> list[Point]:
    """Points that no other beats in accuracy at the same latency or less, fastest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.latency_ms, -point.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front


def tradeoff_plot(points: Sequence[Point], *, width: int, height: int, css_class: str) -> str:
    """Accuracy against latency (log scale): intervals, the Pareto line, and a name at every point."""
    frame = _tradeoff_frame(points, width, height)
    front = " ".join(f"{frame.x(point.latency_ms)},{frame.y(point.accuracy)}" for point in pareto(points))
    parts = [
        '<g aria-hidden="true">',
        *_x_axis(frame, log_ticks(*frame.x_range)),
        *_y_axis(frame, linear_ticks(*frame.y_range)),
        f'<text class="axis" x="{frame.left}" y="14">NDCG@10</text>',
        f'<text class="axis" x="{width - frame.right}" y="{height - 4}" text-anchor="end">'
        "p50 latency of one request, ms (log scale)</text>",
        f'<polyline class="pareto" points="{front}"/>',
        *(_whiskers(frame, point) for point in points),
        *_labels(frame, points),
        "</g>",
        *(_marker(frame, point) for point in sorted(points, key=lambda point: point.latency_ms)),
    ]
    label = f"Accuracy against latency of {len(points)} artefacts; the table below holds the same figures."
    return _svg(width, height, css_class, label, parts, role="group")


def curve_plot(title: str, series: Sequence[Series], *, width: int = 280, height: int = 172) -> str:
    """Draw lines over training steps as a small multiple, each named at its end where there are several."""
    frame = _curve_frame(series, width, height)
    parts = [
        f'<text class="title" x="0" y="13">{escape(title)}</text>',
        *_y_axis(frame, linear_ticks(*frame.y_range, count=4)),
        *_x_axis(frame, linear_ticks(*frame.x_range, count=4), grid=False),
    ]
    for line in series:
        parts.append(f'<polyline class="curve" style="--shade:{line.shade:.2f}" points="{_path(frame, line.points)}"/>')
        if len(line.points) <= 30:
            dots = (f'<circle class="dot" cx="{frame.x(x)}" cy="{frame.y(y)}" r="2.2"/>' for x, y in line.points)
            parts += dots
    if len(series) > 1:
        parts += _end_labels(frame, series)
    ends = ", ".join(f"{line.points[-1][1]:.3g}" for line in series)
    return _svg(width, height, "small", f"{title} over training steps, at the end {ends}", parts)


def rate_plot(
    name: str, rates: Mapping[str, Mapping[int, float]], shown: str, *, width: int = 280, height: int = 190
) -> str:
    """Users a second over the batch size, both logarithmic: one artefact's strong, the others' faint behind it.

    `rates` holds users a second by artefact and batch size; `shown` is what of the name fits as a title.
    """
    sizes = sorted({size for by_size in rates.values() for size in by_size})
    values = [rate for by_size in rates.values() for rate in by_size.values()]
    frame = Frame(
        width, height, left=44, right=22, top=26, bottom=20, x_range=(sizes[0] / 1.2, sizes[-1] * 1.2),
        y_range=(min(values) / 1.6, max(values) * 1.9), log_x=True, log_y=True,
    )  # fmt: skip
    parts = [
        f'<text class="title" x="0" y="13">{escape(shown)}</text>',
        *_y_axis(frame, [10.0**power for power in range(-3, 9) if frame.y_range[0] <= 10.0**power <= frame.y_range[1]]),
        *_x_axis(frame, [float(size) for size in sizes], grid=False),
    ]
    for other, by_size in rates.items():
        if other != name:
            parts.append(f'<polyline class="behind" points="{_path(frame, sorted(by_size.items()))}"/>')
    own = sorted(rates[name].items())
    parts.append(f'<polyline class="curve" style="--shade:1" points="{_path(frame, own)}"/>')
    for size, rate in own:
        x, y = frame.x(size), frame.y(rate)
        parts.append(f'<circle class="dot" cx="{x}" cy="{y}" r="2.8"/>')
        parts.append(f'<text class="value" x="{x}" y="{y - 8}" text-anchor="middle">{_compact(rate)}</text>')
    told = ", ".join(f"{_compact(rate)} in batches of {size}" for size, rate in own)
    return _svg(width, height, "small", f"Users a second of {name}: {told}", parts)


def _compact(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _path(frame: Frame, points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{frame.x(x)},{frame.y(y)}" for x, y in points)


def thinned(points: Sequence[tuple[float, float]], limit: int = 120) -> list[tuple[float, float]]:
    """At most `limit` points, each the mean of its neighbours, so that noise does not hide the trend.

    >>> thinned([(1, 2.0), (2, 4.0), (3, 6.0), (4, 8.0)], limit=2)
    [(1.5, 3.0), (3.5, 7.0)]
    """
    if len(points) <= limit:
        return list(points)
    groups = [points[i * len(points) // limit : (i + 1) * len(points) // limit] for i in range(limit)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _tradeoff_frame(points: Sequence[Point], width: int, height: int) -> Frame:
    fastest, slowest = min(p.latency_ms for p in points), max(p.latency_p90_ms for p in points)
    low, high = min(p.low for p in points), max(p.high for p in points)
    room = 0.12 * (high - low or high or 1.0)
    return Frame(
        width, height, left=50, right=14, top=30, bottom=44,
        x_range=(fastest / 1.5, slowest * 1.6), y_range=(max(0.0, low - room), high + room), log_x=True,
    )  # fmt: skip


def _curve_frame(series: Sequence[Series], width: int, height: int) -> Frame:
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    room = 0.06 * (max(ys) - min(ys) or abs(max(ys)) or 1.0)
    right = 12 if len(series) == 1 else 22
    return Frame(width, height, 44, right, 26, 20, (0.0, max([1.0, *xs])), (min(ys) - room, max(ys) + room))


def _x_axis(frame: Frame, ticks: Sequence[float], *, grid: bool = True) -> list[str]:
    base = frame.height - frame.bottom
    parts = [f'<line class="rule" x1="{frame.left}" x2="{frame.width - frame.right}" y1="{base}" y2="{base}"/>']
    spaced = _spaced([(frame.x(tick), tick) for tick in ticks], gap=30)
    for x, tick in spaced:
        if grid:
            parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{frame.top}" y2="{base}"/>')
        label = _tick(tick)
        anchor = "end" if x > frame.width - 16 else "middle"
        parts.append(f'<text class="tick" x="{x}" y="{base + 15}" text-anchor="{anchor}">{label}</text>')
    return parts


def _spaced(ticks: Sequence[tuple[float, float]], gap: float) -> list[tuple[float, float]]:
    kept: list[tuple[float, float]] = []
    for x, tick in ticks:
        if not kept or x - kept[-1][0] >= gap:
            kept.append((x, tick))
    return kept


def _y_axis(frame: Frame, ticks: Sequence[float]) -> list[str]:
    texts = [_tick(tick) for tick in ticks]
    decimals = max((len(text.partition(".")[2]) for text in texts), default=0)
    if not frame.log_y and not any("e" in text for text in texts):
        texts = [f"{tick:,.{decimals}f}" for tick in ticks]
    parts = []
    for tick, text in zip(ticks, texts, strict=True):
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{frame.left}" x2="{frame.width - frame.right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{frame.left - 7}" y="{y + 4}" text-anchor="end">{text}</text>')
    return parts


def _tick(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def _whiskers(frame: Frame, point: Point) -> str:
    x, y = frame.x(point.latency_ms), frame.y(point.accuracy)
    return (
        f'<g class="whisker {escape(point.kind)}">'
        f'<line x1="{x}" x2="{x}" y1="{frame.y(point.low)}" y2="{frame.y(point.high)}"/>'
        f'<line class="faint" x1="{x}" x2="{frame.x(point.latency_p90_ms)}" y1="{y}" y2="{y}"/></g>'
    )


def _marker(frame: Frame, point: Point) -> str:
    """Draw a shape of its own for every kind, so that colour is never the only sign; it is reached by Tab."""
    x, y = frame.x(point.latency_ms), frame.y(point.accuracy)
    tip = (
        f"{point.name}\nNDCG@10 {point.accuracy:.4f} (95 %: {point.low:.4f} to {point.high:.4f})\n"
        f"p50 {point.latency_ms:.3g} ms, p90 {point.latency_p90_ms:.3g} ms"
    )
    return (
        f'<g class="marker {escape(point.kind)}" tabindex="0" role="img" aria-label="{escape(tip)}">'
        f'<circle class="hit" cx="{x}" cy="{y}" r="12"/>{shape(point.kind, x, y)}</g>'
    )


def shape(kind: str, x: float, y: float) -> str:
    """Circle for checkpoints, square for graphs, diamond for bundles, triangle for engines."""
    if kind == "graph":
        return f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10"/>'
    if kind == "bundle":
        return f'<path d="M{x} {y - 7:.1f}l7 7l-7 7l-7 -7z"/>'
    if kind == "engine":
        return f'<path d="M{x} {y - 7:.1f}l7 12h-14z"/>'
    return f'<circle cx="{x}" cy="{y}" r="5.6"/>'


def _labels(frame: Frame, points: Sequence[Point]) -> list[str]:
    """Names beside their points, in the nearest free place; a thin line leads back where that is far."""
    taken = [Box(frame.x(p.latency_ms) - 7, frame.y(p.accuracy) - 7, 14, 14) for p in points]
    parts = []
    for point in sorted(points, key=lambda point: -point.accuracy):
        name = point.name if len(point.name) <= 26 else f"{point.name[:25]}…"
        x, y = frame.x(point.latency_ms), frame.y(point.accuracy)
        box, far = _free_place(frame, x, y, len(name) * LABEL_WIDTH, taken)
        taken.append(box)
        if far:
            end = min(max(x, box.x), box.x + box.width)
            parts.append(f'<line class="leader" x1="{x}" y1="{y}" x2="{end:.1f}" y2="{box.y + LABEL_HEIGHT / 2:.1f}"/>')
        parts.append(f'<text class="name" x="{box.x:.1f}" y="{box.y + 12:.1f}">{escape(name)}</text>')
    return parts


def _free_place(frame: Frame, x: float, y: float, width: float, taken: Sequence[Box]) -> tuple[Box, bool]:
    """Right, left, then further and further up and down; whiskers are crossed only where the label starts at one."""
    places = []
    for shift in (-14, 14, -30, 30, -46, 46, -62, 62, -78, 78):
        places += [(x + 9, y - 8 + shift, abs(shift) > 20), (x - 9 - width, y - 8 + shift, abs(shift) > 20)]
    inside = [
        (Box(left, top, width, LABEL_HEIGHT), far)
        for left, top, far in places
        if left >= 2 and left + width <= frame.width - 2 and 16 <= top <= frame.height - frame.bottom - LABEL_HEIGHT
    ]
    free = [(box, far) for box, far in inside if not any(box.meets(other) for other in taken)]
    fallback = Box(min(max(2.0, x - width / 2), frame.width - width - 2), max(16.0, y - 26), width, LABEL_HEIGHT)
    return next(iter([*free, *inside]), (fallback, False))


def _end_labels(frame: Frame, series: Sequence[Series]) -> list[str]:
    """Labels at the lines' ends, pushed apart from the bottom up."""
    ends = sorted(((frame.y(line.points[-1][1]), line.label) for line in series), reverse=True)
    highest, parts = frame.height - frame.bottom + 6.0, []
    for y, label in ends:
        highest = min(y, highest - 11)
        x = frame.width - frame.right + 5
        parts.append(f'<text class="tick" x="{x}" y="{highest + 4:.1f}">{escape(label)}</text>')
    return parts


def _svg(width: int, height: int, css_class: str, label: str, parts: Sequence[str], role: str = "img") -> str:
    return (
        f'<svg class="{css_class}" viewBox="0 0 {width} {height}" role="{role}" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )

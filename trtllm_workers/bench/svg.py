"""Charts as SVG text: axes, ticks, lines, markers, labels that do not cover each other. Knows no benchmark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

# Okabe and Ito's colours, which people with any kind of colour vision tell apart.
BLUE, VERMILION, GREEN, ORANGE, PURPLE, BLACK = (
    *("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#222222"),
)
FONT = "font-family=\"'DejaVu Sans', Verdana, Helvetica, Arial, sans-serif\""
_GRID, _AXIS, _TEXT, _FAINT = "#E3E6EA", "#8A9099", "#222222", "#5A616B"
_MARKER = 4.2
_CHAR_PX = 6.1  # width of a character of 11 px, on average
_BOLD_CHAR_PX = 7.4
_LABEL_PX = 13


@dataclass(frozen=True, slots=True)
class Point:
    """One measured point; ``label`` stands beside it, ``hollow`` marks one that is not to be trusted."""

    x: float
    y: float
    label: str = ""
    hollow: bool = False


@dataclass(frozen=True, slots=True)
class Series:
    """Points joined by a line. ``marker`` is circle, square or triangle, ``dash`` SVG's own."""

    name: str
    points: Sequence[Point]
    colour: str
    marker: str = "circle"
    dash: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """One pair of axes at a place of the picture. ``x_ticks`` are drawn as they are, else chosen.

    On a logarithmic axis all values are above 0.
    """

    title: str
    x_title: str
    y_title: str
    left: float
    top: float
    width: float
    height: float
    series: Sequence[Series]
    x_log: bool = False
    x_ticks: Sequence[float] = ()
    y_log: bool = False


@dataclass(slots=True)
class _Boxes:
    """Places that are taken by markers and labels."""

    taken: list[tuple[float, float, float, float]] = field(default_factory=list)

    def free(self, box: tuple[float, float, float, float]) -> bool:
        left, top, right, bottom = box
        return not any(
            left < other[2] and other[0] < right and top < other[3] and other[1] < bottom
            for other in self.taken
        )


def document(
    width: float, height: float, title: str, subtitle: str, charts: Sequence[Chart]
) -> str:
    """Return a whole SVG picture on a light ground."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img" {FONT}>',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width:g}" height="{height:g}" fill="#FFFFFF"/>',
        _text(28, 34, title, size=18, weight="bold"),
        _text(28, 56, subtitle, size=12, colour=_FAINT),
    ]
    for chart in charts:
        parts += _chart(chart)
    return "\n".join([*parts, "</svg>", ""])


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers that cover ``low`` to ``high``, ``most`` of them at most (one more)."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(one * power for one in (1, 2, 2.5, 5, 10) if one * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten that cover ``low`` to ``high``; of many only the powers."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if math.log10(high / low) < 2 else (1,)
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    below = [one for one in ticks if one <= low * (1 + 1e-9)]
    above = [one for one in ticks if one >= high * (1 - 1e-9)]
    return [one for one in ticks if below[-1] <= one <= above[0]]


def tick_text(value: float) -> str:
    """Return a tick's number as short as it can be said."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:,.10g}"


def _chart(chart: Chart) -> list[str]:
    points = [point for series in chart.series for point in series.points]
    centre = chart.left + chart.width / 2
    parts = [
        _text(chart.left, chart.top - 14, chart.title, size=13, weight="bold"),
        _text(centre, chart.top + chart.height + 40, chart.x_title, anchor="middle"),
        _text(
            chart.left - 54,
            chart.top + chart.height / 2,
            chart.y_title,
            anchor="middle",
            turned=True,
        ),
    ]
    if not points:
        middle = chart.top + chart.height / 2
        return [*parts, _text(centre, middle, "nothing was measured", anchor="middle")]
    xs, ys = [point.x for point in points], [point.y for point in points]
    if chart.x_log:
        x_ticks = list(chart.x_ticks) or sorted(set(xs))
        edges = (math.log2(min(x_ticks)) - 0.25, math.log2(max(x_ticks)) + 0.25)
        to_x = _scale(*edges, chart.left, chart.left + chart.width, math.log2)
    else:
        x_ticks = nice_ticks(0, max(xs) * 1.02)
        to_x = _scale(x_ticks[0], x_ticks[-1], chart.left, chart.left + chart.width)
    bottom = chart.top + chart.height
    if chart.y_log:
        y_ticks = log_ticks(min(ys), max(ys))
        to_y = _scale(math.log2(y_ticks[0]), math.log2(y_ticks[-1]), bottom, chart.top, math.log2)
    else:
        y_ticks = nice_ticks(0, max(ys) * 1.04, 5)
        to_y = _scale(y_ticks[0], y_ticks[-1], bottom, chart.top)
    parts += _axes(chart, x_ticks, y_ticks, to_x, to_y)
    boxes = _Boxes()
    for point in points:
        at_x, at_y = to_x(point.x), to_y(point.y)
        boxes.taken.append((at_x - 5, at_y - 5, at_x + 5, at_y + 5))
    parts += _legend(chart, boxes, to_x, to_y)
    for series in chart.series:
        places = [(to_x(point.x), to_y(point.y)) for point in series.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dash = f' stroke-dasharray="{series.dash}"' if series.dash else ""
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{series.colour}" '
            f'stroke-width="2" stroke-linejoin="round"{dash}/>'
        )
        for point, (x, y) in zip(series.points, places, strict=True):
            parts.append(_marker(series.marker, x, y, series.colour, hollow=point.hollow))
    for series in chart.series:
        for point in series.points:
            if point.label:
                at = (to_x(point.x), to_y(point.y))
                parts += _label(point.label, at, series.colour, boxes, chart)
    return parts


def _axes(
    chart: Chart,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
) -> list[str]:
    bottom, right = chart.top + chart.height, chart.left + chart.width
    parts = []
    for value in y_ticks:
        y = to_y(value)
        parts.append(_line(chart.left, y, right, y, _GRID))
        parts.append(_text(chart.left - 8, y + 4, tick_text(value), anchor="end", colour=_FAINT))
    written = -math.inf
    for value in x_ticks:
        x = to_x(value)
        parts.append(_line(x, chart.top, x, bottom, _GRID))
        half = len(tick_text(value)) * _CHAR_PX / 2 + 3
        if x - half > written:  # levels side by side would write over each other
            parts.append(_text(x, bottom + 18, tick_text(value), anchor="middle", colour=_FAINT))
            written = x + half
    parts.append(_line(chart.left, bottom, right, bottom, _AXIS))
    parts.append(_line(chart.left, chart.top, chart.left, bottom, _AXIS))
    return parts


def _legend(
    chart: Chart, boxes: _Boxes, to_x: Callable[[float], float], to_y: Callable[[float], float]
) -> list[str]:
    """Return the names of the series, in the corner that covers the fewest points."""
    named = [series for series in chart.series if series.name]
    if not named:
        return []
    wide = 40 + max(len(series.name) for series in named) * _CHAR_PX
    high = 16.0 * len(named) + 6
    corners = [
        (left, top)
        for left in (chart.left + 10, chart.left + chart.width - wide - 6)
        for top in (chart.top + 8, chart.top + chart.height - high - 8)
    ]

    def covered(corner: tuple[float, float]) -> int:
        left, top = corner
        hits = 0
        for series in chart.series:
            places = [(to_x(point.x), to_y(point.y)) for point in series.points]
            for (x1, y1), (x2, y2) in zip(places, [*places[1:], places[-1]], strict=True):
                for share in (0, 0.25, 0.5, 0.75):
                    x, y = x1 + (x2 - x1) * share, y1 + (y2 - y1) * share
                    hits += left - 8 < x < left + wide + 8 and top - 8 < y < top + high + 8
        return hits

    left, top = min(corners, key=covered)
    boxes.taken.append((left, top, left + wide, top + high))
    parts = [
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{high:.1f}" rx="4" '
        f'fill="#FFFFFF" fill-opacity="0.85" stroke="{_GRID}"/>'
    ]
    for row, series in enumerate(named):
        y = top + 11 + 16 * row
        parts.append(_line(left + 6, y, left + 28, y, series.colour, width=2, dash=series.dash))
        parts.append(_marker(series.marker, left + 17, y, series.colour, hollow=False))
        parts.append(_text(left + 34, y + 4, series.name))
    return parts


def _label(
    text: str, at: tuple[float, float], colour: str, boxes: _Boxes, chart: Chart
) -> list[str]:
    """Return a label beside a point where it covers nothing; none where there is no such place."""
    x, y = at
    wide = len(text) * _BOLD_CHAR_PX + 4
    for left, middle in (
        *((x + 8, y - 8), (x + 8, y + 10), (x - 8 - wide, y - 8), (x - 8 - wide, y + 10)),
        *((x - wide / 2, y - 14), (x - wide / 2, y + 16), (x + 14, y), (x - 14 - wide, y)),
    ):
        box = (left, middle - _LABEL_PX / 2, left + wide, middle + _LABEL_PX / 2)
        inside = chart.left < box[0] and box[2] < chart.left + chart.width + 20
        if (
            inside
            and chart.top - 8 < box[1]
            and box[3] < chart.top + chart.height
            and boxes.free(box)
        ):
            boxes.taken.append(box)
            word = _text(left, middle + 4, text, colour=colour, weight="bold")
            # A white edge under it, so that it can be read across a line.
            edge = word.replace("<text ", '<text stroke="#FFFFFF" stroke-width="3" ', 1)
            return [edge, word]
    return []


def _scale(
    low: float,
    high: float,
    start: float,
    end: float,
    to: Callable[[float], float] = lambda value: value,
) -> Callable[[float], float]:
    return lambda value: start + (to(value) - low) / (high - low) * (end - start)


def _marker(kind: str, x: float, y: float, colour: str, *, hollow: bool) -> str:
    fill = "#FFFFFF" if hollow else colour
    style = f'fill="{fill}" stroke="{colour}" stroke-width="1.5"'
    size = _MARKER
    if kind == "square":
        edge = 2 * size - 1
        return f'<rect x="{x - edge / 2:.1f}" y="{y - edge / 2:.1f}" width="{edge}" height="{edge}" {style}/>'
    if kind == "triangle":
        tips = f"{x:.1f},{y - size - 1:.1f} {x - size:.1f},{y + size:.1f} {x + size:.1f},{y + size:.1f}"
        return f'<polygon points="{tips}" {style}/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" {style}/>'


def _line(
    x1: float, y1: float, x2: float, y2: float, colour: str, *, width: float = 1, dash: str = ""
) -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
        f'stroke="{colour}" stroke-width="{width:g}"{dashed}/>'
    )


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 11,
    anchor: str = "start",
    colour: str = _TEXT,
    weight: str = "normal",
    turned: bool = False,
) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
        f'fill="{colour}" font-weight="{weight}"{turn}>{escape(text)}</text>'
    )

"""Curves of several runs as one drawing: an SVG file that needs nothing else, in any browser."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LINE = 460, 300, 60, 30, 40, 16
SMOOTH = 50  # the training loss is a running mean over this share of its points

Points = list[tuple[float, float]]


def svg(runs: Mapping[str, Sequence[Mapping[str, Any]]], metric: str) -> str:
    """The training loss and the held-out ``metric`` of each run, by step; ``runs``: the lines of their metrics."""
    panels = {
        "training loss": {name: _smooth(_points(rows, "loss")) for name, rows in runs.items()},
        f"held out {metric}": {name: _points(rows, f"eval_{metric}") for name, rows in runs.items()},
    }
    panels = {title: lines for title, lines in panels.items() if any(lines.values())}
    colours = {name: f"hsl({360 * i / len(runs):.0f} 70% 42%)" for i, name in enumerate(runs)}
    parts = [_panel(title, lines, colours, i * WIDTH) for i, (title, lines) in enumerate(panels.items())]
    for i, (name, colour) in enumerate(colours.items()):
        y = HEIGHT + LINE * (i + 1)
        parts.append(f'<path d="M{LEFT} {y - 4}h24" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{LEFT + 32}" y="{y}">{escape(name)}</text>')
    width, height = WIDTH * max(len(panels), 1) + 20, HEIGHT + LINE * (len(colours) + 1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> Points:
    """(step, value) where there is one that is finite."""
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None and math.isfinite(row[name])]


def _smooth(points: Points) -> Points:
    size = max(1, len(points) // SMOOTH)
    means = []
    for i in range(len(points)):
        part = [value for _, value in points[max(0, i - size + 1) : i + 1]]
        means.append((points[i][0], sum(part) / len(part)))
    return means


def _panel(title: str, lines: Mapping[str, Points], colours: Mapping[str, str], x0: int) -> str:
    steps = [step for points in lines.values() for step, _ in points]
    low, high = _range([value for points in lines.values() for _, value in points])
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def x(step: float) -> float:
        return x0 + LEFT + (step - first) / (last - first) * (WIDTH - LEFT)

    def y(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    parts = [f'<text x="{x0 + LEFT}" y="{TOP - 12}" font-weight="bold">{escape(title)}</text>']
    for i in range(5):
        value = low + (high - low) * i / 4
        parts.append(f'<path d="M{x0 + LEFT} {y(value):.1f}H{x0 + WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="{x0 + LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for step, anchor in ((first, "start"), (last, "end")):
        parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="{anchor}">step {step}</text>')
    for name, points in lines.items():
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        line = f'fill="none" stroke="{colours[name]}" stroke-width="1.5"'
        parts.append(f'<polyline points="{path}" {line}><title>{escape(name)}</title></polyline>')
        if len(points) == 1:
            parts.append(
                f'<circle cx="{x(points[0][0]):.1f}" cy="{y(points[0][1]):.1f}" r="3" fill="{colours[name]}"/>'
            )
    return "\n".join(parts)


def _range(values: list[float]) -> tuple[float, float]:
    """What to show: all but the worst twentieth, so that a run that diverged does not flatten the others."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[max(0, math.ceil(0.95 * len(ordered)) - 1)]
    return low, high if high > low else low + 1.0

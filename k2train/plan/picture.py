"""A plan as a picture: memory of a device, and time of a step, as bars of an SVG file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from k2train.plan.estimate import Estimate
from k2train.units import duration, memory

WIDTH, LEFT, ROW = 860, 280, 22  # points
COLOUR, LIMIT = "#4477aa", "#cc3311"


def picture(found: Estimate) -> str:
    """The file's text, of the phase that needs most memory."""
    phase, config = found.fullest, found.layout.config
    held = phase.memory
    title = f"{config.name} on {found.layout.ranks:,} devices, phase {phase.part.name}"
    lines = [f'<text x="10" y="24" font-size="16">{escape(title)}</text>']
    whole = max(held.total, held.capacity)
    top, bars = _panel(
        f"Memory of a device: {memory(held.total)} of {memory(held.capacity)}",
        {name: (value, memory(value)) for name, value in held.components.items()},
        whole=whole,
        top=54,
    )
    lines += bars
    at = LEFT + (WIDTH - LEFT - 90) * held.capacity / whole
    lines.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="60" y2="{top - 8}" stroke="{LIMIT}" stroke-dasharray="4"/>')
    time = phase.time
    top, bars = _panel(
        f"A step: {time.step:.3g} s, utilisation {time.utilisation:.1%}",
        {
            name: (value, duration(value) if value >= 1 else f"{1e3 * value:.3g} ms")
            for name, value in time.parts.items()
        },
        whole=time.step,
        top=top + 24,
    )
    lines += bars
    size = f'width="{WIDTH}" height="{top}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    return "\n".join([head, f'<rect {size} fill="white"/>', *lines, "</svg>", ""])


def _panel(title: str, values: Mapping[str, tuple[float, str]], *, whole: float, top: int) -> tuple[int, list[str]]:
    """Bars one below the other, each beginning where the last one ends; and where the next panel may begin."""
    lines, at = [f'<text x="10" y="{top}" font-weight="bold">{escape(title)}</text>'], float(LEFT)
    for name, (value, text) in values.items():
        if not value:
            continue
        top += ROW
        width = (WIDTH - LEFT - 90) * value / whole
        lines += [
            f'<text x="{LEFT - 8}" y="{top}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{at:.1f}" y="{top - 12}" width="{max(width, 0.5):.1f}" height="15" fill="{COLOUR}"/>',
            f'<text x="{at + width + 4:.1f}" y="{top}">{escape(text)}</text>',
        ]
        at += width
    return top + ROW, lines

"""Charts as an SVG file that needs nothing else, for a page of text to show."""

from __future__ import annotations

from collections.abc import Sequence

from k2train.report import chart as charts
from k2train.report.chart import HEIGHT, LEFT, WIDTH, Chart
from k2train.report.page import templates

COLUMNS = 2  # of charts
HEAD = 18  # of the SVG's units, for a chart's title
ENTRIES, ENTRY_HEIGHT = 3, 13  # of the legend in a row; of a row


def figure(drawn: Sequence[Chart]) -> str:
    """The file's text: the charts, two side by side."""
    panels, y = [], 8.0
    for row in range(0, len(drawn), COLUMNS):
        heights = []
        for column, chart in enumerate(drawn[row : row + COLUMNS]):
            legend = _legend(chart)
            panels.append((chart, column * WIDTH, y, legend))
            heights.append(HEAD + HEIGHT + ENTRY_HEIGHT * -(-len(legend) // ENTRIES) + 12)
        y += max(heights)
    width = WIDTH * min(COLUMNS, len(drawn))
    return templates().get_template("figure.svg").render(panels=panels, width=width, height=y, head=HEAD, box=charts)


def _legend(chart: Chart) -> list[tuple[dict[str, object], float, float]]:
    """(line, left, baseline) of each entry; none for a single curve."""
    named = [line for line in chart.lines if line["name"]]
    wide = (WIDTH - LEFT) / ENTRIES
    return [
        (line, LEFT + k % ENTRIES * wide, HEIGHT + ENTRY_HEIGHT * (k // ENTRIES + 1))
        for k, line in enumerate(named if len(named) > 1 else [])
    ]

"""Charts as an SVG file that needs nothing else, for a page of text to show."""

from __future__ import annotations

from collections.abc import Sequence

from k2train.report import chart as charts
from k2train.report.chart import HEIGHT, LEFT, WIDTH, Chart
from k2train.report.page import templates

COLUMNS = 2  # of charts
HEAD = 18  # of the SVG's units, for a chart's title
# Of the legend: the height of a row; of an entry the width of its line with the space around it, and of a character.
ENTRY_HEIGHT, ENTRY_LINE, CHARACTER = 13, 38, 5.2


def figure(drawn: Sequence[Chart]) -> str:
    """The file's text: the charts, two side by side."""
    panels, y = [], 8.0
    for row in range(0, len(drawn), COLUMNS):
        heights = []
        for column, chart in enumerate(drawn[row : row + COLUMNS]):
            legend = _legend(chart)
            panels.append((chart, column * WIDTH, y, legend))
            heights.append(HEAD + (legend[-1][2] if legend else HEIGHT) + 12)
        y += max(heights)
    width = WIDTH * min(COLUMNS, len(drawn))
    return templates().get_template("figure.svg").render(panels=panels, width=width, height=y, head=HEAD, box=charts)


def _legend(chart: Chart) -> list[tuple[dict[str, object], float, float]]:
    """(line, left, baseline) of each entry; none for a single curve."""
    named = [line for line in chart.lines if line["name"]]
    found: list[tuple[dict[str, object], float, float]] = []
    left, row = float(LEFT), 1
    for line in named if len(named) > 1 else []:
        wide = ENTRY_LINE + CHARACTER * len(str(line["name"]))
        if found and left + wide > WIDTH:
            left, row = float(LEFT), row + 1
        found.append((line, left, HEIGHT + ENTRY_HEIGHT * row))
        left += wide
    return found

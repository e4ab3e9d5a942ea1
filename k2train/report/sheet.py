"""A page of tables and charts on several runs, in the manner of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from k2train import __version__
from k2train.paths import atomic_write
from k2train.report import chart as charts
from k2train.report.chart import Chart
from k2train.report.page import templates


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page; what is empty is left out."""

    title: str
    text: Sequence[str] = ()  # paragraphs
    head: Sequence[str] = ()  # of the table, from its second column on
    rows: Sequence[tuple[str, Sequence[str]]] = ()  # label and cells
    charts: Sequence[Chart] = ()


def write_sheet(page: Path, title: str, sections: Sequence[Section]) -> None:
    """Writes the page, whole or not at all; it needs nothing but itself.

    Raises:
        OSError: it cannot be written.
    """
    found = (
        templates().get_template("sheet.html").render(version=__version__, title=title, sections=sections, box=charts)
    )
    atomic_write(page, found)

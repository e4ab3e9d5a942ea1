"""What is left of a run to look at: its records, a page of them, and its result."""

from k2train.report.chart import Chart, Series
from k2train.report.figure import figure
from k2train.report.grid import named_lines, named_tiles
from k2train.report.page import write_page
from k2train.report.records import ReportError, Run, read_run
from k2train.report.sheet import Section, write_sheet
from k2train.report.summary import Summary, summary_table

__all__ = [
    "Chart",
    "ReportError",
    "Run",
    "Section",
    "Series",
    "Summary",
    "figure",
    "named_lines",
    "named_tiles",
    "read_run",
    "summary_table",
    "write_page",
    "write_sheet",
]

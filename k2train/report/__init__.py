"""What is left of a run to look at: its records, a page of them, and its result."""

from k2train.report.figure import figure
from k2train.report.page import write_page
from k2train.report.records import ReportError, Run, read_run
from k2train.report.summary import Summary, summary_table

__all__ = ["ReportError", "Run", "Summary", "figure", "read_run", "summary_table", "write_page"]

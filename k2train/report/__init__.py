"""What is left of a run to look at: its curves and its result."""

from k2train.report.curves import draw_curves, read_records
from k2train.report.summary import Summary, summary_table

__all__ = ["Summary", "draw_curves", "read_records", "summary_table"]

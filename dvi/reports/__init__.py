"""What a run says about its optimizer, in words and numbers."""

from dvi.reports.numbers import report_of
from dvi.reports.report import Report

__all__ = ["Report", "report_of"]

"""What people see: tables on a terminal, figures, and one self-contained HTML page."""

from ntkengine.report.html import Section, write_report
from ntkengine.report.tables import Table

__all__ = ["Section", "Table", "write_report"]

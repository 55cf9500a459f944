"""Tables of finished runs in, fitted scaling laws, comparisons and a report out; knows nothing of how runs are made."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["fit_points", "read_points", "write_report"]

if TYPE_CHECKING:
    from analysis.findings.document import fit_points
    from analysis.points.table import read_table as read_points
    from analysis.report.report import write_report
else:
    _PLACES = {
        "fit_points": "analysis.findings.document:fit_points",
        "read_points": "analysis.points.table:read_table",
        "write_report": "analysis.report.report:write_report",
    }

    def __getattr__(name: str) -> Any:
        """Import a name of `__all__` when it is first used."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, _, attribute = _PLACES[name].partition(":")
        return getattr(import_module(module), attribute)

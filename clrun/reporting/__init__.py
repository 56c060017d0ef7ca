"""Tables, statistics and pictures from run folders; reads files only, imports neither torch nor a method."""

from clrun.reporting.sweep import SweepResult, refresh, report

__all__ = ["SweepResult", "refresh", "report"]

"""Tables, statistics and figures from the files of runs; imports neither torch nor a method."""

from clrun.reporting.sweep import SweepResult, refresh, report

__all__ = ["SweepResult", "refresh", "report"]

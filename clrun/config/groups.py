"""The configuration groups of a run, and the keys of a node that Hydra reads itself."""

GROUPS = ("dataset", "scenario", "task_order", "backbone", "method", "budget", "hardware", "logger", "job")
RESERVED = frozenset({"_target_", "_partial_", "_convert_", "_recursive_"})

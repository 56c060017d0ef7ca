"""The configuration groups of a run, and the keys of a node that Hydra reads itself."""

GROUPS = ("dataset", "scenario", "task_order", "backbone", "method", "compress", "budget", "hardware", "logger", "job")
OPTIONAL = ("compress",)  # groups with a choice that adds no node to the configuration
RESERVED = frozenset({"_target_", "_partial_", "_convert_", "_recursive_"})

"""Running a configuration: building its parts, the loop over tasks, evaluation, checkpoints, sweeps."""

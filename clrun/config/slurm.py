"""Defaults of `hydra/launcher=submitit_slurm` that suit runs which go on where they stopped.

Hydra's plugin never starts a job again after its time limit and asks for 120 seconds of each limit.
"""

from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import open_dict

DEFAULTS: dict[str, Any] = {
    "max_num_timeout": 100,  # times that a job may reach its limit and go on
    "signal_delay_s": 60,  # seconds before the limit at which it is told to stop
    "additional_parameters": {"requeue": True},  # Slurm itself starts it again after a node has failed or preemption
}
FILE = "submitit_slurm.yaml"


def suit_slurm() -> None:
    """Give the launcher these defaults, where its package is installed and has registered it."""
    launchers = ConfigStore.instance().repo.get("hydra", {}).get("launcher", {})
    if FILE not in launchers:
        return
    node = launchers[FILE].node
    with open_dict(node):
        node.update(DEFAULTS)

"""clrun: continual-learning experiments composed from data set, backbone, method, task order and hardware."""

import os

__version__ = "0.1.0"

# Threads that wait for each other by spinning take the processor from those they wait for as soon as anything else runs
# on the machine: a run of small networks then takes twenty times as long. Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

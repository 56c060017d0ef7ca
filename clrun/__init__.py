"""clrun: continual-learning experiments composed from data set, backbone, method, task order and hardware."""

__version__ = "0.1.0"

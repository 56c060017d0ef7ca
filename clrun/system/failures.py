"""How a failed run is told: in one line where its cause is known, and a traceback would help nobody."""

from clrun.system.errors import ConfigError, NumericalError, one_line

# What torch says where the memory of the machine does not suffice, or the address space.
NO_MEMORY = ("can't allocate memory", "Storage size calculation overflowed", "numel: integer multiplication overflow")


def told(error: BaseException) -> list[str]:
    """Return the lines that tell why a run failed; none for a bug, which wants a traceback.

    The traceback of what has begun is in the run's clrun.log in any case.
    """
    if isinstance(error, ConfigError):
        return str(error).splitlines()
    if isinstance(error, NumericalError):
        return [one_line(error)]
    text, on_gpu = one_line(error), type(error).__name__ == "OutOfMemoryError"
    if isinstance(error, MemoryError) or on_gpu or any(x in text for x in NO_MEMORY):
        return [f"out of memory ({text}); make batches, memories or the network smaller"]
    return []

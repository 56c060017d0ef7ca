"""One-line messages for failures with a known cause."""

from clrun.system.errors import ConfigError, NumericalError, one_line

# Parts of the messages that torch raises when the memory of the machine or its address space is too small.
NO_MEMORY = ("can't allocate memory", "Storage size calculation overflowed", "numel: integer multiplication overflow")


def failure_lines(error: BaseException) -> list[str]:
    """Return the lines to print for a failure with a known cause, or none for a bug, which needs a traceback.

    Once a run has begun, its clrun.log has the traceback in both cases.
    """
    if isinstance(error, ConfigError):
        return str(error).splitlines()
    if isinstance(error, NumericalError):
        return [one_line(error)]
    text, on_gpu = one_line(error), type(error).__name__ == "OutOfMemoryError"
    if isinstance(error, MemoryError) or on_gpu or any(x in text for x in NO_MEMORY):
        return [f"out of memory ({text}); use smaller batches, a smaller memory or a smaller network"]
    return []

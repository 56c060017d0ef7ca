"""Options that trade plasticity for stability, and the order in which `clrun.running.tuning` decays them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

Values = dict[str, float]  # by name of the knob


@dataclass(frozen=True)
class Knob:
    """An option whose decay gives up stability for plasticity; a method lists its own in `Method.knobs`.

    Attributes:
        name: attribute of the method that holds the value and is read whenever the value is needed; dotted for an
            attribute of one of its parts.
        operation: with a factor below 1, "multiply" is value * factor; "divide" is value / factor, for an option whose
            larger values give more plasticity.
        bound: the value at which decay stops; None for 0, with "divide" for none.
    """

    name: str
    operation: Literal["multiply", "divide"] = "multiply"
    bound: float | None = None

    def decayed(self, value: float, factor: float) -> float:
        """Return the value after one decay; the same value when it has reached its bound."""
        if self.operation == "divide":
            return min(value / factor, max(value, math.inf if self.bound is None else self.bound))
        return max(value * factor, min(value, self.bound or 0.0))


def read(method: object, knobs: Sequence[Knob]) -> Values:
    """Return the current values of the knobs of `method`."""
    return {knob.name: float(attrgetter(knob.name)(method)) for knob in knobs}


def write(method: object, values: Values) -> None:
    """Set the values of knobs in `method`."""
    for name, value in values.items():
        path, _, attribute = name.rpartition(".")
        owner: Any = attrgetter(path)(method) if path else method
        setattr(owner, attribute, value)


def decays(start: Values, knobs: Sequence[Knob], factor: float) -> Iterator[Values]:
    """Yield `start`, then values that are decayed further and further, until no knob can be decayed any more.

    A single knob is decayed step by step. Several knobs take turns from values of reference: first each of them is
    decayed alone, then all of them together, which gives the next values of reference. (5, 2) with factor 0.5 gives
    (2.5, 2), (5, 1), (2.5, 1), (1.25, 1), (2.5, 0.5), (1.25, 0.5), ... A knob at 0 or at its bound is left out.
    """
    reference = start
    yield reference
    while True:
        decayed = {knob.name: knob.decayed(reference[knob.name], factor) for knob in knobs}
        moving = [name for name, value in decayed.items() if value != reference[name]]
        if not moving:
            return
        if len(moving) > 1:
            yield from ({**reference, name: decayed[name]} for name in moving)
        reference = decayed
        yield reference

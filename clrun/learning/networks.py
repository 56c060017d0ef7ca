"""Networks that a run loads besides its backbone, for methods that learn from them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from clrun.data.split import Transform
from clrun.data.transforms import ImageTransform, SecondView

Factory = Callable[..., nn.Module]


@dataclass(frozen=True)
class FrozenNetwork:
    """A network in eval mode whose weights never change. Copies of a method share it.

    It is not a module: its weights are no weights of the method, and they are never trained, averaged over processes or
    exported.

    Attributes:
        name: a short name, for records.
        network: maps its input to features [B, D].
        transform: turns images of the shape that the backbone reads, values 0..255, into its input; None if it reads
            the same prepared images as the backbone.
        about: a description for run.json.
    """

    name: str
    network: nn.Module
    transform: ImageTransform | None = None
    about: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Freeze the network."""
        self.network.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenNetwork":
        """Return the same object: it never changes."""
        return self

    @property
    def width(self) -> int:
        """D."""
        return int(self.network.num_features)  # type: ignore[arg-type]

    def view(self, prepared: Transform) -> Callable[[Tensor], Tensor]:
        """Return what turns the images that `prepared` has made for the backbone into the input of this network."""
        if self.transform is None:
            return lambda x: x
        assert isinstance(prepared, ImageTransform), "checked when the network was loaded"
        return SecondView(prepared, self.transform)

"""Linear probe: a linear classifier trained by gradient descent on frozen features (Kornblith et al., CVPR 2019).

Memory between tasks: 4 C (D + 1) bytes, the classifier. Task id: not needed.

Verified: the head alone is trained (test_methods_closed_form).
"""

from collections.abc import Mapping
from typing import Any

from clrun.methods.finetune import Finetune


class LinearProbe(Finetune):
    """Finetuning of the head alone: the budget, the loss and the forgetting are those of `Finetune`.

    Features are those of the eval view: `dataset.augment` has no effect.

    Args:
        backbone: identity of width D; the engine feeds features.
        num_classes: C.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    @classmethod
    def reads_features(cls, options: Mapping[str, Any]) -> bool:
        return True

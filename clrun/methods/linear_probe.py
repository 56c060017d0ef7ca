"""Linear probe: a linear classifier trained by gradient descent on frozen features (Kornblith et al., CVPR 2019).

Memory between tasks: the classifier, 4 C (D + 1) bytes. Task id: not needed.

Verified: only the head is trained (test_methods_closed_form).
"""

from collections.abc import Mapping
from typing import Any

from clrun.methods.finetune import Finetune


class LinearProbe(Finetune):
    """Finetuning of the head only, with the loss of `Finetune`.

    Features are computed from images without augmentation: `dataset.augment` has no effect.

    Args:
        backbone: an identity of width D, because the inputs of this method are features.
        num_classes: C.
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    @classmethod
    def reads_features(cls, options: Mapping[str, Any]) -> bool:
        return True

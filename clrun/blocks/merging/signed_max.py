"""Entry by entry the value of largest magnitude among those with the sign of the mean: the fusion of TUNA."""

import torch
from torch import Tensor

from clrun.blocks.merging.base import Evidence, Merge, Total


class SignedMax(Merge):
    """theta* = s max over models with s theta_t > 0 of |theta_t|, s the sign of the mean of theta_t, entry by entry.

    An entry whose mean is 0 has the sign -1, as in the public code; without a value of the elected sign it is 0. Unlike
    `Ties` it reads weights instead of their change since theta_0, trims nothing, and takes a maximum instead of a mean.
    Source: TUNA (Wang, Zhou and Ye, ICCV 2025, arXiv 2508.08165).

    State: one sum of P entries, and the largest and the smallest value of each entry.
    """

    def _begin(self, size: int) -> None:
        self.sum = Total(size, exact=self.exact)
        self.highest, self.lowest = (torch.zeros(size, dtype=self.kind) for _ in range(2))

    def _add(self, model: Tensor, evidence: Evidence, key: int, weight: float) -> None:
        if weight != 1:
            raise ValueError("SignedMax: models have no coefficients")
        model = model.to(self.highest.dtype)
        self.sum.plus(model)
        self.highest, self.lowest = torch.maximum(self.highest, model), torch.minimum(self.lowest, model)

    def _value(self, newest: Tensor | None) -> Tensor:
        return torch.where(self.sum.value() > 0, self.highest, self.lowest)


__all__ = ["SignedMax"]

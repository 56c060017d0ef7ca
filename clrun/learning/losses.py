"""Losses on logits over all C classes, restricted to the classes that compete.

The option `compete` of every method that trains a classifier by cross-entropy says which classes compete in the
training loss. Published tables follow different conventions, and class-incremental accuracy depends on the choice.

- "current": for a row of the current task the classes of this task, for a replayed row the classes of the row's own
  task. The head's rows of all other classes receive no gradient from the cross-entropy.
- "seen": the classes that also compete when the row is evaluated after this task. In class- and domain-incremental
  streams these are all classes seen so far, those of the current task included; in task-incremental streams they are
  the classes of the row's own task, so that "seen" and "current" agree there.
- "all": every class of the data set in every setting. The head has initialised rows for all of them from the first
  task on, and each loss pushes down the classes that have not come yet. This is a plain softmax cross-entropy, the
  convention of mammoth, of the authors of DER and of many published tables.

Under "current" and "seen" a class that has not come yet has the logit 0, its row in the head is 0 and receives no
gradient, weight decay or momentum.

The option applies to current and replayed rows alike, to the logits that an importance or a Fisher information is
estimated from, and to the sigmoids of a binary cross-entropy. It does not apply to terms that compare logits with
stored or a teacher's ones: those name their columns themselves. It does not change predictions either: at evaluation
the candidates are those of the setting (`clrun.data.stream.Stream.candidates`), whatever competed in training.

Three kinds of methods do not have the option, because there is no choice to make: methods whose every task has a head
of its own (those for task-incremental streams only, and esn); methods whose classifier has a closed form; and methods
that train a temporary head on the classes of one task and discard it (aper, cl_lora, ease, phase 1 of ranpac).
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Compete = Literal["current", "seen", "all"]


def masked_cross_entropy(logits: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """Return the mean cross-entropy [] over the classes allowed by `mask`.

    Args:
        logits: [B, C].
        y: [B] long, class ids; each must be allowed for its sample, otherwise the loss is infinite.
        mask: [B, C] or [C] bool, True for classes that compete.
    """
    return F.cross_entropy(logits.masked_fill(~mask, float("-inf")), y)


def smoothed_cross_entropy(logits: Tensor, y: Tensor, mask: Tensor, smoothing: float) -> Tensor:
    """Return the mean cross-entropy [] with label smoothing over the classes allowed by `mask`.

    Args:
        logits: [B, C].
        y: [B] long, class ids; each must be allowed for its sample.
        mask: [B, C] bool, True for classes that compete.
        smoothing: share of the target that is spread evenly over the classes that compete.
    """
    if not smoothing:
        return masked_cross_entropy(logits, y, mask)
    log_p = logits.masked_fill(~mask, float("-inf")).log_softmax(dim=1).masked_fill(~mask, 0.0)
    even = log_p.sum(dim=1) / mask.sum(dim=1)
    return -((1 - smoothing) * log_p.gather(1, y[:, None])[:, 0] + smoothing * even).mean()


def task_mean_cross_entropy(logits: Tensor, y: Tensor, t: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over tasks of the mean cross-entropy of their rows, []: every task counts alike.

    Args:
        logits: [B, C].
        y: [B] long, class ids.
        t: [B] long, position of each row's task; those that occur count.
        mask: [B, C] bool, True for classes that compete.
    """
    rows = F.cross_entropy(logits.masked_fill(~mask, float("-inf")), y, reduction="none")
    tasks, own, counts = torch.unique(t, return_inverse=True, return_counts=True)
    mean: Tensor = (rows / counts[own]).sum() / len(tasks)
    return mean


def masked_binary_cross_entropy(
    logits: Tensor, targets: Tensor, mask: Tensor, *, reduction: Literal["sum", "mean"]
) -> Tensor:
    """Return the binary cross-entropy [] of independent sigmoids, over the entries allowed by `mask`.

    Args:
        logits: [B, C].
        targets: [B, C], probabilities.
        mask: [B, C] bool, True for entries that count.
        reduction: over the classes of a row: "sum", then the mean over rows; "mean": over all entries that count.
    """
    terms = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none") * mask
    return terms.sum() / (len(logits) if reduction == "sum" else mask.sum())


def masked_symmetric_cross_entropy(
    logits: Tensor, y: Tensor, mask: Tensor, *, weight: float, reverse_weight: float
) -> Tensor:
    """Return weight CE + reverse_weight RCE [], the symmetric cross-entropy over the classes allowed by `mask`.

    RCE = -sum_k max(p_k, 1e-7) ln max(y_k, 1e-4) with the one-hot labels y exchanges the roles of prediction and label
    (Wang et al., ICCV 2019, arXiv 1908.06112). It is linear in the probability of the true class, 9.2103 (1 - p_y) up
    to the bound 1e-7, and hence bounded.

    Args:
        logits: [B, C].
        y: [B] long, class ids; each must be allowed for its sample, otherwise the loss is infinite.
        mask: [B, C] or [C] bool, True for classes that compete.
        weight: of the cross-entropy.
        reverse_weight: of the reverse cross-entropy.
    """
    likelihoods = logits.masked_fill(~mask, float("-inf")).log_softmax(dim=1)
    loss = weight * F.nll_loss(likelihoods, y)
    if not reverse_weight:
        return loss
    wrong = (likelihoods.exp().clamp_min(1e-7) * mask).scatter(1, y[:, None], 0.0)
    return loss - reverse_weight * math.log(1e-4) * wrong.sum(dim=1).mean()


def paired_cross_entropy(logits: Tensor) -> Tensor:
    """Return the symmetric loss [] of CLIP of logits [B, B] of B images (rows) and their texts (columns), in order.

    It is the mean of the cross-entropy of each image over all texts, and of each text over all images. Texts of other
    images of the same class count as negatives, too.
    """
    own = torch.arange(len(logits), device=logits.device)
    return 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own))

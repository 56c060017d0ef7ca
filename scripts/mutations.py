"""Would the tests notice a wrong number? Small mistakes in the numeric core, one at a time, met by its tests.

    python scripts/mutations.py [--only a_gem,herding] [--jobs 1] [--list] [--markdown]

Each mutation replaces one text, which its file must contain exactly once, by another that is wrong: a flipped sign, a
dropped mask, a swapped index, an off by one in a metric, another axis, a forgotten normalisation, another reduction.
For each the repository is copied to a temporary folder, the change is made there, and the named test files run until
the first failure. The same files run without a change first, and must pass. The table says which test caught each
mutation; the exit status is 1 when fewer than 95 % were caught. The mutations were chosen before any was tried: none
was taken out for surviving, and a survivor is answered by a test.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("clrun", "conf", "tests", "scripts", "docs", "pyproject.toml", "README.md", "LICENSE")
CAUGHT = 0.95  # share of the mutations that the tests must catch
PATIENCE = 3600  # seconds after which tests that do not end say nothing


@dataclass(frozen=True)
class Mutation:
    """One mistake.

    Attributes:
        name: short, for `--only`.
        kind: sign, mask, index, off by one, axis, normalisation, reduction, order, factor.
        file: below clrun/.
        old: the text that is right.
        new: the text that is wrong.
        effect: what it breaks.
        tests: files below tests/, those of the subject.
    """

    name: str
    kind: str
    file: str
    old: str
    new: str
    effect: str
    tests: tuple[str, ...]

    def found(self, root: Path = ROOT) -> int:
        """Return how often the file contains the old text."""
        return (root / "clrun" / self.file).read_text().count(self.old)

    def apply(self, root: Path) -> None:
        """Make the mistake in the copy at `root`."""
        path = root / "clrun" / self.file
        text = path.read_text()
        assert text.count(self.old) == 1, f"{path}: {self.old!r} is there {text.count(self.old)} times"
        path.write_text(text.replace(self.old, self.new))


MUTATIONS = (
    # --- metrics and what is made of them
    Mutation(
        "average_incremental",
        "off by one",
        "results/metrics.py",
        "for k in range(1, len(m.order) + 1))",
        "for k in range(1, len(m.order)))",
        "average incremental accuracy leaves out the last task",
        ("unit/test_metrics.py",),
    ),
    Mutation(
        "forgetting_maximum",
        "off by one",
        "results/metrics.py",
        "np.fmax.reduce(accuracy[:-1])",
        "np.fmax.reduce(accuracy)",
        "forgetting counts the last row in its maximum and is never negative",
        ("unit/test_metrics.py",),
    ),
    Mutation(
        "backward_mean",
        "normalisation",
        "results/metrics.py",
        "np.diagonal(accuracy))[:-1])",
        "np.diagonal(accuracy)))",
        "backward transfer is divided by T instead of T - 1",
        ("unit/test_metrics.py",),
    ),
    Mutation(
        "forward_row",
        "index",
        "results/metrics.py",
        "np.diagonal(accuracy) - accuracy[0]",
        "np.diagonal(accuracy[1:]) - accuracy[0]",
        "forward transfer reads a task after it was learned",
        ("unit/test_metrics.py",),
    ),
    Mutation(
        "opd_axis",
        "axis",
        "results/robustness.py",
        "np.ptp(means, axis=0)",
        "np.ptp(means, axis=1)",
        "disparity is taken over tasks instead of orders",
        ("unit/test_robustness.py",),
    ),
    Mutation(
        "incomplete_runs",
        "mask",
        "results/robustness.py",
        "np.where(complete, finals, 0.0)",
        "np.where(np.isnan(finals), 0.0, finals)",
        "cells of a run that lacks others count in the mean of its order",
        ("unit/test_robustness.py",),
    ),
    Mutation(
        "interval_width",
        "off by one",
        "results/robustness.py",
        "spread / math.sqrt(orders)",
        "spread / math.sqrt(orders - 1)",
        "the interval over orders is too wide",
        ("unit/test_robustness.py",),
    ),
    Mutation(
        "position_of_a_task",
        "index",
        "results/order_effects.py",
        "np.array([np.argsort(order) for order in orders]",
        "np.array([list(order) for order in orders]",
        "the order is read as if it were the positions of the tasks",
        ("unit/test_order_effects.py",),
    ),
    Mutation(
        "seed_floor",
        "normalisation",
        "results/order_effects.py",
        "math.sqrt(one.seed / size)",
        "math.sqrt(one.seed)",
        "the seed-only floor forgets that seeds are averaged",
        ("unit/test_order_effects.py",),
    ),
    Mutation(
        "holm_step",
        "off by one",
        "results/comparison.py",
        "(len(p) - done) * p[index]",
        "(len(p) - done - 1) * p[index]",
        "Holm's first factor is m - 1",
        ("unit/test_order_effects.py",),
    ),
    # --- streams, evaluation, training
    Mutation(
        "classes_seen",
        "off by one",
        "data/stream.py",
        "self.members[:learned].any(dim=0)",
        "self.members[: learned + 1].any(dim=0)",
        "classes of the next task compete already",
        ("unit/test_scenarios.py",),
    ),
    Mutation(
        "task_mask",
        "mask",
        "data/stream.py",
        "return self.members & seen if",
        "return self.members if",
        "task-incremental: an unseen task has candidates",
        ("unit/test_scenarios.py",),
    ),
    Mutation(
        "larger_tasks",
        "order",
        "data/scenarios.py",
        "(k < left % others)",
        "(k >= others - left % others)",
        "sizes that do not come out even put the larger tasks last",
        ("unit/test_scenarios.py",),
    ),
    Mutation(
        "williams_row",
        "sign",
        "data/orders.py",
        "order = [(task + row) % n_tasks for task in zigzag]",
        "order = [(row - task) % n_tasks for task in zigzag]",
        "the rows of the Williams design are mirrored",
        ("unit/test_orders.py",),
    ),
    Mutation(
        "evaluation_mask",
        "index",
        "running/evaluation.py",
        "self._count(method, task, masks[:, task.index], members[task.index], ranks=last)",
        "self._count(method, task, masks[:, 0], members[task.index], ranks=last)",
        "every task is read among the candidates of the first",
        ("unit/test_evaluation.py",),
    ),
    Mutation(
        "task_inference",
        "index",
        "running/evaluation.py",
        "own[choice]",
        "own[y].expand(choice.shape)",
        "task inference looks at the label instead of the prediction",
        ("unit/test_evaluation.py",),
    ),
    Mutation(
        "seed_by_position",
        "index",
        "learning/context.py",
        'generator(self.seed, "task", self.task.id, *purpose)',
        'generator(self.seed, "task", self.task.index, *purpose)',
        "random numbers follow the position of a task instead of its identity",
        ("unit/test_methods_low_rank.py",),
    ),
    Mutation(
        "warmup_start",
        "off by one",
        "learning/budget.py",
        "return (step + 1) / (rise + 1)",
        "return step / (rise + 1)",
        "the first step of a warm-up has the learning rate 0",
        ("unit/test_training.py",),
    ),
    Mutation(
        "gradients_kept",
        "reduction",
        "learning/training.py",
        "parameter.grad = None  # what",
        "parameter.grad = parameter.grad  # what",
        "gradients add up over the steps",
        ("unit/test_methods_gradients.py",),
    ),
    # --- heads and losses
    Mutation(
        "head_rows_anew",
        "mask",
        "learning/heads.py",
        "new = classes[~self.initialised[classes]]",
        "new = classes",
        "rows of classes that were seen before begin anew",
        ("unit/test_blocks_heads.py",),
    ),
    Mutation(
        "head_bound",
        "sign",
        "learning/heads.py",
        "* 2 * bound - bound",
        "* bound",
        "weights of a new class begin positive",
        ("unit/test_blocks_heads.py",),
    ),
    Mutation(
        "euclidean_factor",
        "factor",
        "learning/heads.py",
        "return 2 * F.linear(features, self.prototypes)",
        "return F.linear(features, self.prototypes)",
        "the nearest mean is not the nearest",
        ("unit/test_methods_closed_form.py", "unit/test_blocks_heads.py"),
    ),
    Mutation(
        "bce_mask",
        "mask",
        "learning/losses.py",
        'targets, reduction="none") * mask',
        'targets, reduction="none")',
        "sigmoids of classes that do not compete count in the loss",
        ("unit/test_methods_exemplars.py",),
    ),
    Mutation(
        "task_mean",
        "reduction",
        "learning/losses.py",
        "(rows / counts[own]).sum() / len(tasks)",
        "rows.mean()",
        "tasks count by their rows instead of alike",
        ("unit/test_methods_gradients.py", "unit/test_methods_exemplars.py"),
    ),
    # --- curvature
    Mutation(
        "penalty_half",
        "factor",
        "blocks/curvature/penalty.py",
        "return 0.5 * value",
        "return value",
        "the penalty is twice what its gradient in closed form says",
        ("unit/test_blocks_curvature.py", "unit/test_curvature_forms.py"),
    ),
    Mutation(
        "mean_anchor",
        "index",
        "blocks/curvature/penalty.py",
        "torch.lerp(past, self.anchor, weight)",
        "torch.lerp(self.anchor, past, weight)",
        "separate anchors are averaged with the weights exchanged",
        ("unit/test_blocks_curvature.py", "unit/test_curvature_forms.py"),
    ),
    Mutation(
        "online_decay",
        "factor",
        "blocks/curvature/penalty.py",
        "self.curvature.scale(self.decay).add(",
        "self.curvature.add(",
        "online EWC forgets its decay",
        ("unit/test_blocks_curvature.py", "unit/test_curvature_forms.py"),
    ),
    Mutation(
        "proximal_diagonal",
        "index",
        "blocks/curvature/forms.py",
        "(point + pull * anchor) / (1 + pull)",
        "(anchor + pull * point) / (1 + pull)",
        "the proximal step goes to the wrong end",
        ("unit/test_curvature_forms.py",),
    ),
    Mutation(
        "fisher_columns",
        "factor",
        "blocks/curvature/target.py",
        "p.gather(-1, choice)[..., None].sqrt()",
        "p.gather(-1, choice)[..., None]",
        "the exact Fisher weighs a class by p^2 instead of p",
        ("unit/test_blocks_curvature.py",),
    ),
    Mutation(
        "fisher_mask",
        "mask",
        "blocks/curvature/target.py",
        'p = logits.masked_fill(~mask, float("-inf")).softmax(dim=-1)',
        "p = logits.softmax(dim=-1)",
        "classes that do not compete have probability in the Fisher",
        ("unit/test_blocks_curvature.py", "unit/test_curvature_kfac.py"),
    ),
    Mutation(
        "fisher_mean",
        "normalisation",
        "blocks/curvature/gradients.py",
        "target.names[name]: value / len(target.split) for",
        "target.names[name]: value for",
        "the diagonal Fisher is a sum over rows",
        ("unit/test_blocks_curvature.py",),
    ),
    Mutation(
        "kfac_positions",
        "normalisation",
        "blocks/curvature/layers.py",
        "return flat.T @ flat / x.shape[1]",
        "return flat.T @ flat",
        "the inputs of shared weights count once a position",
        ("unit/test_curvature_kfac.py",),
    ),
    Mutation(
        "factored_damping",
        "index",
        "blocks/curvature/kronecker.py",
        "((outer, sqrt(damping) / pi), (inner, sqrt(damping) * pi))",
        "((outer, sqrt(damping) * pi), (inner, sqrt(damping) / pi))",
        "factored damping is spread the wrong way",
        ("unit/test_curvature_forms.py",),
    ),
    Mutation(
        "woodbury_sign",
        "sign",
        "blocks/curvature/m_fac.py",
        "return (vector - self.gradients.T",
        "return (vector + self.gradients.T",
        "the inverse of a low-rank matrix adds what it must take away",
        ("unit/test_curvature_forms.py",),
    ),
    Mutation(
        "kl_start",
        "index",
        "blocks/curvature/kronecker.py",
        "torch.cat([inner.mean(dim=0), outer.mean(dim=0)])",
        "torch.cat([outer.mean(dim=0), inner.mean(dim=0)])",
        "the KL-optimal sum of Kronecker products exchanges its factors",
        ("unit/test_curvature_forms.py",),
    ),
    # --- sums of features and their solutions
    Mutation(
        "ridge_residual",
        "factor",
        "blocks/ridge.py",
        "(s + 2 * strength)",
        "(s + strength)",
        "the squared error of a ridge solution is too large",
        ("unit/test_blocks_ridge.py",),
    ),
    Mutation(
        "gcv_square",
        "factor",
        "blocks/ridge.py",
        "self.rows / left**2 if",
        "self.rows / left if",
        "generalised cross-validation chooses too weak a strength",
        ("unit/test_blocks_ridge.py",),
    ),
    Mutation(
        "scatter_counts",
        "normalisation",
        "blocks/statistics.py",
        "(means * self.rows[:, None]).t() @ means",
        "means.t() @ means",
        "the scatter forgets how many rows a class has",
        ("unit/test_blocks_statistics.py",),
    ),
    Mutation(
        "covariance_below",
        "off by one",
        "blocks/statistics.py",
        "return spread / (count - 1) if",
        "return spread / count if",
        "the covariance of a class is divided by n",
        ("unit/test_blocks_statistics.py",),
    ),
    Mutation(
        "rounding_error",
        "sign",
        "blocks/statistics.py",
        "(a - (total - virtual)) + (b - virtual)",
        "(a - (total - virtual)) - (b - virtual)",
        "exact sums keep the wrong error",
        ("unit/test_blocks_statistics.py",),
    ),
    Mutation(
        "unlearning_sign",
        "sign",
        "blocks/statistics.py",
        "self.pooled.add(other.pooled, sign=sign)",
        "self.pooled.add(other.pooled)",
        "the Gram matrix of an unlearned task is added again",
        ("unit/test_blocks_statistics.py", "unit/test_methods_closed_form.py"),
    ),
    Mutation(
        "logme_determinant",
        "factor",
        "blocks/logme.py",
        ".sum(dim=0) + (width - len(values)) * alpha.log()",
        ".sum(dim=0)",
        "eigenvalues that are 0 are left out of the evidence",
        ("unit/test_blocks_logme.py",),
    ),
    # --- memories and gradients
    Mutation(
        "reservoir_bounds",
        "off by one",
        "blocks/buffers.py",
        "generator=generator) * number).floor()",
        "generator=generator) * (number + 1)).floor()",
        "the reservoir draws from n + 1 numbers: late rows are rarer",
        ("unit/test_blocks_buffers.py",),
    ),
    Mutation(
        "ring_start",
        "off by one",
        "blocks/buffers.py",
        "self.start += min(self.offered, ring)",
        "self.start += ring",
        "a task with few rows leaves a gap in the ring",
        ("unit/test_blocks_buffers.py",),
    ),
    Mutation(
        "class_reservoir",
        "factor",
        "blocks/buffers.py",
        "accept < len(own) / self.offered[label]",
        "accept < 1 / self.offered[label]",
        "late rows of a class are rarer than early ones",
        ("unit/test_blocks_buffers.py",),
    ),
    Mutation(
        "herding_sum",
        "factor",
        "blocks/buffers.py",
        "(k * mean - total)",
        "(mean - total)",
        "herding runs away from the mean",
        ("unit/test_methods_exemplars.py",),
    ),
    Mutation(
        "a_gem_sign",
        "sign",
        "blocks/gradients.py",
        "dot(gradient, reference).clamp(max=0)",
        "dot(gradient, reference).clamp(min=0)",
        "steps that help the memory are projected, those that hurt are not",
        ("unit/test_blocks_gradients.py",),
    ),
    Mutation(
        "gem_margin",
        "factor",
        "blocks/gradients.py",
        "(inner + margin * gram.sum(dim=1)).cpu()",
        "inner.cpu()",
        "GEM with a margin solves another programme",
        ("unit/test_blocks_gradients.py", "unit/test_methods_gradients.py"),
    ),
    Mutation(
        "replay_again",
        "mask",
        "methods/er.py",
        "if ctx.progress.epoch == 0:",
        "if ctx.progress.epoch >= 0:",
        "rows are offered to the memory in every epoch",
        ("unit/test_methods_replay.py",),
    ),
    Mutation(
        "der_columns",
        "index",
        "methods/der.py",
        "compared = self.seen[old.t]",
        "compared = self.seen[-1].expand(len(old), -1)",
        "logits of classes that were not there yet are compared",
        ("unit/test_methods_replay.py",),
    ),
    # --- masks, distillation, low ranks
    Mutation(
        "prune_magnitude",
        "sign",
        "blocks/masks.py",
        "weight.flatten()[mine].abs().argsort(stable=True)",
        "weight.flatten()[mine].argsort(stable=True)",
        "PackNet prunes the most negative weights",
        ("unit/test_blocks_masks.py",),
    ),
    Mutation(
        "owners_seen",
        "mask",
        "blocks/masks.py",
        "(self.owner > 0) & (self.owner <= task + 1)",
        "(self.owner > 0) & (self.owner == task + 1)",
        "a task does not see the weights of earlier ones",
        ("unit/test_blocks_masks.py",),
    ),
    Mutation(
        "hat_plasticity",
        "reduction",
        "blocks/gates.py",
        "used = torch.minimum(used, columns[path]",
        "used = torch.maximum(used, columns[path]",
        "a weight is protected as the more used of its units",
        ("unit/test_blocks_masks.py",),
    ),
    Mutation(
        "teacher_temperature",
        "normalisation",
        "blocks/distillation.py",
        "(target[:, columns].float() / tau)",
        "(target[:, columns].float())",
        "the teacher is read at temperature 1",
        ("unit/test_methods_distillation.py",),
    ),
    Mutation(
        "divergence",
        "index",
        "blocks/distillation.py",
        "F.kl_div(student, teacher,",
        "F.kl_div(teacher, student,",
        "the divergence is that of the teacher from the student",
        ("unit/test_methods_distillation.py",),
    ),
    Mutation(
        "window_mean",
        "reduction",
        "blocks/low_rank.py",
        "else error.mean(dim=2)",
        "else error.sum(dim=2)",
        "the residual of a convolution is as large as its window",
        ("unit/test_blocks_low_rank.py",),
    ),
    Mutation(
        "rank_share",
        "off by one",
        "blocks/low_rank.py",
        "before = best.cumsum(0) - best",
        "before = best.cumsum(0)",
        "one singular value too few is kept",
        ("unit/test_blocks_low_rank.py",),
    ),
    # --- methods
    Mutation(
        "si_path",
        "sign",
        "methods/si.py",
        "self.omega -= self.gradient *",
        "self.omega += self.gradient *",
        "weights count that made the loss rise",
        ("unit/test_methods_importance.py",),
    ),
    Mutation(
        "qr_root",
        "factor",
        "methods/qr.py",
        "self.strength * self.penalty.importance.sqrt() + TINY",
        "self.strength * self.penalty.importance + TINY",
        "QR compares a root with a square",
        ("unit/test_methods_importance.py",),
    ),
    Mutation(
        "blip_mean",
        "off by one",
        "methods/blip.py",
        "((index + 1) * before + fisher[name]) / (index + 2)",
        "(index * before + fisher[name]) / (index + 1)",
        "the mean information forgets the prior",
        ("unit/test_methods_columns.py",),
    ),
    Mutation(
        "dgc_mean",
        "normalisation",
        "methods/dgc.py",
        "(task.index * self.past.gradient + new) / (task.index + 1)",
        "(task.index * self.past.gradient + new) / max(1, task.index)",
        "the gradient on all earlier tasks is too long",
        ("unit/test_methods_gradients.py",),
    ),
    Mutation(
        "mer_step_back",
        "index",
        "methods/mer.py",
        "torch.lerp(start[name], parameter, weight)",
        "torch.lerp(parameter, start[name], weight)",
        "MER interpolates with the weights exchanged",
        ("unit/test_methods_gradients.py",),
    ),
    Mutation(
        "icarl_targets",
        "factor",
        "methods/icarl.py",
        "target.float().sigmoid(), goal)",
        "target.float(), goal)",
        "old classes are given logits as probabilities",
        ("unit/test_methods_exemplars.py",),
    ),
    Mutation(
        "hat_compensation",
        "index",
        "methods/hat.py",
        "return s_max / s * (torch.cosh(",
        "return s / s_max * (torch.cosh(",
        "gradients of embeddings vanish where gates are flat",
        ("unit/test_methods_masks.py",),
    ),
    Mutation(
        "lae_decay",
        "index",
        "methods/lae.py",
        "slow.lerp_(fast, 1 - self.step_decay)",
        "slow.lerp_(fast, self.step_decay)",
        "the offline module follows at once",
        ("unit/test_methods_prompts.py",),
    ),
    Mutation(
        "fecam_off_diagonal",
        "normalisation",
        "blocks/statistics.py",
        "max(1, width * (width - 1))",
        "max(1, width * width)",
        "the mean off the diagonal counts the diagonal",
        ("unit/test_methods_closed_form.py",),
    ),
    Mutation(
        "l2p_pull",
        "sign",
        "methods/l2p.py",
        "return loss - self.pull * scores",
        "return loss + self.pull * scores",
        "keys are pushed away from the queries that chose them",
        ("unit/test_methods_prompts.py",),
    ),
    # --- searches and checkpoints
    Mutation(
        "stability_margin",
        "sign",
        "running/tuning.py",
        "threshold = (1 - self.drop)",
        "threshold = (1 + self.drop)",
        "stability decay asks for more than finetuning reaches",
        ("unit/test_tuning.py",),
    ),
    Mutation(
        "worst_move",
        "sign",
        "data/order_search.py",
        "int(np.argmin(self._predicted(known, chosen)))",
        "int(np.argmax(self._predicted(known, chosen)))",
        "the search for the worst order tries the best",
        ("unit/test_order_search.py",),
    ),
    Mutation(
        "backbone_digest",
        "mask",
        "running/checkpoint.py",
        "or tensor_digest(built[name]) != digest:",
        "or not digest:",
        "a checkpoint goes on with another backbone",
        ("integration/test_checkpoint.py",),
    ),
    # --- merging, Gaussians, LoRA, two towers, texts, compression
    Mutation(
        "fisher_merge_weight",
        "factor",
        "blocks/merging/averages.py",
        "precision = weight * self.precision(evidence)",
        "precision = self.precision(evidence)",
        "Fisher merging ignores the weights of the models",
        ("unit/test_blocks_merging.py",),
    ),
    Mutation(
        "cofima_share",
        "sign",
        "blocks/merging/averages.py",
        "share = alpha * now / (alpha * now + (1 - alpha) * past)",
        "share = (1 - alpha) * now / (alpha * past + (1 - alpha) * now)",
        "CoFiMA weighs the old model by alpha",
        ("unit/test_blocks_merging.py",),
    ),
    Mutation(
        "coma_alpha",
        "off by one",
        "blocks/merging/averages.py",
        "alpha = 1 / (self.models + 1) if self.alpha is None",
        "alpha = 1 / (self.models + 2) if self.alpha is None",
        "the running mean of models gives the newest too little",
        ("unit/test_blocks_merging.py",),
    ),
    Mutation(
        "ties_count",
        "normalisation",
        "blocks/merging/vectors.py",
        "positive / self.above.clamp(min=1)",
        "positive / (self.above + self.below).clamp(min=1)",
        "TIES divides by all models instead of those that agree",
        ("unit/test_blocks_merging.py",),
    ),
    Mutation(
        "ties_sign",
        "sign",
        "blocks/merging/vectors.py",
        "sign = (positive + negative).sign()",
        "sign = (positive - negative).sign()",
        "TIES elects a wrong sign",
        ("unit/test_blocks_merging.py",),
    ),
    Mutation(
        "dare_rescale",
        "factor",
        "blocks/merging/vectors.py",
        "/ (1 - self.drop)",
        "/ (1 + 0 * self.drop)",
        "DARE does not rescale what is left",
        ("unit/test_blocks_merging.py",),
    ),
    Mutation(
        "magmax_tie",
        "order",
        "blocks/merging/signed_max.py",
        "torch.where(self.sum.value() > 0, self.highest, self.lowest)",
        "torch.where(self.sum.value() > 0, self.lowest, self.highest)",
        "the extreme of the other sign is merged",
        ("unit/test_blocks_merging.py",),
    ),
    Mutation(
        "regmean_rows",
        "normalisation",
        "blocks/merging/regmean.py",
        '/ (gram.rows if self.gram == "mean" else 1)',
        "/ 1",
        "RegMean sums moments where it has to average them",
        ("unit/test_blocks_merging.py",),
    ),
    Mutation(
        "regmean_damping",
        "factor",
        "blocks/merging/regmean.py",
        "torch.diag((1 - self.alpha) * diagonal + self.delta)",
        "torch.diag(self.alpha * diagonal + self.delta)",
        "the diagonal of the Gram matrices is not restored",
        ("unit/test_blocks_merging.py",),
    ),
    Mutation(
        "opcm_norm",
        "off by one",
        "blocks/merging/projections.py",
        "self.norms / (self.models + 1)",
        "self.norms / (self.models + 2)",
        "OPCM keeps a wrong norm",
        ("unit/test_blocks_merging.py",),
    ),
    Mutation(
        "gaussian_between",
        "factor",
        "blocks/gaussian.py",
        "spread * (before * count / (before + count))",
        "spread * (before * count)",
        "a second task's rows of a class widen its Gaussian without end",
        ("unit/test_blocks_gaussian.py",),
    ),
    Mutation(
        "gaussian_degrees",
        "off by one",
        "blocks/gaussian.py",
        "return int(rows.sum()) - int((rows > 0).sum())",
        "return int(rows.sum()) - 1",
        "a shared covariance has wrong degrees of freedom",
        ("unit/test_blocks_gaussian.py",),
    ),
    Mutation(
        "gaussian_age",
        "off by one",
        "blocks/gaussian.py",
        "factors = 1 - shrink * ages / (ctx.task.index + 1)",
        "factors = 1 - shrink * ages / (ctx.task.index + 2)",
        "means shrink too little with age",
        (
            "unit/test_blocks_gaussian.py",
            "unit/test_methods_slca.py",
        ),
    ),
    Mutation(
        "centroid_jitter",
        "factor",
        "blocks/task_gaussians.py",
        "[*(self.variances + self.jitter).sqrt()]",
        "[*(self.variances + self.jitter)]",
        "draws around a centroid spread by the variance",
        ("unit/test_blocks_task_gaussians.py",),
    ),
    Mutation(
        "lora_scale",
        "factor",
        "blocks/lora.py",
        "return self.scale * (self.up @ self.down)",
        "return self.up @ self.down",
        "the merged weight of LoRA lacks the scale",
        ("unit/test_blocks_lora.py",),
    ),
    Mutation(
        "moments_rows",
        "off by one",
        "blocks/moments.py",
        "found[name].rows + rows.shape[-2]",
        "found[name].rows + rows.shape[-1]",
        "second moments are divided by the width",
        (
            "unit/test_blocks_input_space.py",
            "unit/test_methods_gpm.py",
        ),
    ),
    Mutation(
        "space_complement",
        "sign",
        "blocks/input_space.py",
        "return inside if self.complement else rows - inside",
        "return rows - inside if self.complement else inside",
        "gradients are projected onto what they must leave",
        (
            "unit/test_blocks_input_space.py",
            "unit/test_methods_gpm.py",
        ),
    ),
    Mutation(
        "space_share",
        "off by one",
        "blocks/input_space.py",
        "int((start + sums < share).sum()) + 1",
        "int((start + sums < share).sum())",
        "a direction too few is protected",
        (
            "unit/test_blocks_input_space.py",
            "unit/test_methods_gpm.py",
        ),
    ),
    Mutation(
        "orthogonality_squares",
        "reduction",
        "blocks/orthogonality.py",
        'product.square().sum() if penalty == "squares"',
        'product.square().mean() if penalty == "squares"',
        "the penalty of O-LoRA shrinks with the number of tasks",
        ("unit/test_methods_lora.py",),
    ),
    Mutation(
        "contrast_temperature",
        "normalisation",
        "blocks/contrast.py",
        "products = F.linear(rows, rows) / temperature",
        "products = F.linear(rows, rows)",
        "the contrast has no temperature",
        (
            "unit/test_methods_hide.py",
            "unit/test_methods_mos.py",
        ),
    ),
    Mutation(
        "rail_kernel",
        "factor",
        "methods/rail.py",
        "return torch.exp(-self.width * distances.clamp_(min=0))",
        "return torch.exp(-self.width * distances.clamp_(min=0).sqrt())",
        "RAIL's kernel is that of distances",
        ("unit/test_methods_names.py",),
    ),
    Mutation(
        "rail_fusion",
        "order",
        "methods/rail.py",
        "fused = (1 - self.fusion) * p + self.fusion * regression",
        "fused = self.fusion * p + (1 - self.fusion) * regression",
        "zero-shot and regression exchange their weights",
        ("unit/test_methods_names.py",),
    ),
    Mutation(
        "rail_gate",
        "index",
        "methods/rail.py",
        "torch.where(self.learned[p.argmax(dim=1)][:, None], fused, p)",
        "torch.where(self.learned[p.argmin(dim=1)][:, None], fused, p)",
        "RAIL fuses for the least probable class",
        ("unit/test_methods_names.py",),
    ),
    Mutation(
        "zscl_tau",
        "factor",
        "methods/zscl.py",
        "return tau**2 * F.kl_div",
        "return F.kl_div",
        "distillation loses the factor of its temperature",
        ("unit/test_methods_zscl.py",),
    ),
    Mutation(
        "zscl_teacher",
        "order",
        "methods/zscl.py",
        "for values in (target, student))",
        "for values in (student, target))",
        "the divergence has student and teacher exchanged",
        ("unit/test_methods_zscl.py",),
    ),
    Mutation(
        "proof_factor",
        "normalisation",
        "methods/proof.py",
        "self.factor = 1 / math.sqrt(width)",
        "self.factor = 1 / width",
        "PROOF's attention is divided by the width",
        ("unit/test_methods_names.py",),
    ),
    Mutation(
        "text_end",
        "normalisation",
        "methods/text_to_text.py",
        "return total / real.sum(dim=1) if mean else total",
        "return total / real.shape[1] if mean else total",
        "scores of strings are means over padding, too",
        ("unit/test_text_to_text.py",),
    ),
    Mutation(
        "text_padding",
        "mask",
        "methods/text_to_text.py",
        "total = (of_tokens * real).sum(dim=1)",
        "total = of_tokens.sum(dim=1)",
        "padding is part of the likelihood of a string",
        ("unit/test_text_to_text.py",),
    ),
    Mutation(
        "names_weight",
        "factor",
        "methods/ncm_names.py",
        "sums, count = texts + rows[:, None] * means, count + rows",
        "sums, count = texts + means, count + rows",
        "all mentions of a name count as one",
        ("unit/test_methods_ncm_names.py",),
    ),
    Mutation(
        "acil_kernel",
        "factor",
        "methods/acil.py",
        "torch.exp(-distances / (2 * self.sigma**2))",
        "torch.exp(-distances / self.sigma**2)",
        "the kernel of GKEAL is too narrow",
        ("unit/test_methods_acil.py",),
    ),
    Mutation(
        "acil_shares",
        "normalisation",
        "methods/acil.py",
        "weights = shares * len(present) / shares[present].sum()",
        "weights = shares",
        "AIR's weights do not sum to the number of classes",
        ("unit/test_methods_acil.py",),
    ),
    Mutation(
        "sema_deviation",
        "off by one",
        "methods/sema.py",
        "spread / (count - 1).clamp(min=1)",
        "spread / count.clamp(min=1)",
        "the deviation of a descriptor is that of a population",
        ("unit/test_methods_sema.py",),
    ),
    Mutation(
        "esn_energy",
        "sign",
        "methods/esn.py",
        'energy = -total if self.energy_sign == "paper"',
        'energy = total if self.energy_sign == "paper"',
        "the anchor pulls the energy the wrong way",
        ("unit/test_methods_esn.py",),
    ),
    Mutation(
        "swag_precision",
        "factor",
        "methods/swag.py",
        "1 / (variance + self.damping)",
        "1 / (variance + self.damping).sqrt()",
        "importances are inverse deviations",
        ("unit/test_methods_swag.py",),
    ),
    Mutation(
        "dlcft_target",
        "factor",
        "methods/dlcft.py",
        "share * 0.5 * error.square().sum(dim=1).mean()",
        "share * 0.5 * error.square().mean()",
        "DLCFT averages the squared error over classes",
        ("unit/test_methods_dlcft.py",),
    ),
    Mutation(
        "imm_transfer",
        "factor",
        "methods/imm.py",
        "loss + 2 * self.l2_transfer * self.transfer",
        "loss + self.l2_transfer * self.transfer",
        "L2 transfer is half as strong",
        ("unit/test_methods_merging.py",),
    ),
    Mutation(
        "imm_drop",
        "order",
        "methods/imm.py",
        "before + F.dropout(units, rate) * (output - before)",
        "output + F.dropout(units, rate) * (before - output)",
        "drop transfer drops towards the new model",
        ("unit/test_methods_merging.py",),
    ),
    Mutation(
        "fwsvd_unweigh",
        "order",
        "blocks/compress/factors.py",
        "return left / d[:, None], right",
        "return left, right",
        "weighted factors are not divided by their weights",
        ("unit/test_blocks_compress.py",),
    ),
    Mutation(
        "als_target",
        "mask",
        "blocks/compress/factors.py",
        "targets = (fisher * matrix) @ right.T",
        "targets = matrix @ right.T",
        "alternating least squares forgets the Fisher information",
        ("unit/test_blocks_compress.py",),
    ),
    Mutation(
        "grid_clamp",
        "off by one",
        "blocks/compress/grid.py",
        ".clamp(0, 2**self.bits - 1)",
        ".clamp(0, 2**self.bits)",
        "a grid has a value too many",
        ("unit/test_blocks_compress.py",),
    ),
    Mutation(
        "obc_score",
        "factor",
        "blocks/compress/obs.py",
        "return change.square() / (2 * pivot)",
        "return change.square() * (2 * pivot)",
        "OBC removes the wrong weights",
        ("unit/test_blocks_compress.py",),
    ),
    Mutation(
        "obc_pairs",
        "off by one",
        "blocks/compress/obs.py",
        "lost = (~rows.left).view(len(some), -1, m).sum(dim=2) >= m - n",
        "lost = (~rows.left).view(len(some), -1, m).sum(dim=2) > m - n",
        "N:M removes too many of a group",
        ("unit/test_blocks_compress.py",),
    ),
    Mutation(
        "m_fac_score",
        "normalisation",
        "blocks/compress/m_fac.py",
        "return weights.square() / (2 * inverse.diagonal())",
        "return weights.square()",
        "M-FAC prunes by magnitude",
        ("unit/test_blocks_compress.py",),
    ),
    Mutation(
        "tokens_cut",
        "off by one",
        "data/tokens.py",
        "[: max_tokens - 1] + [self.end]",
        "[:max_tokens] + [self.end]",
        "a text has a token more than allowed",
        (
            "unit/test_tokens.py",
            "unit/test_t5.py",
        ),
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What the tests said: `by` is the test that failed first, or None; `broken` what kept them from judging."""

    by: str | None
    broken: str | None = None
    seconds: float = 0.0


def tested(root: Path, files: tuple[str, ...]) -> Outcome:
    """Run test files of the copy at `root` until the first failure."""
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--no-header", "--tb=no"]
    command = [sys.executable, "-m", "pytest", *options, *(f"tests/{file}" for file in files)]
    try:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return Outcome(None, f"no end in {PATIENCE} s", PATIENCE)
    seconds = time.perf_counter() - start
    failed = re.search(r"^FAILED tests/(\S+)", done.stdout, re.MULTILINE)
    if done.returncode == 1 and failed:
        return Outcome(failed[1], seconds=seconds)
    if done.returncode:  # a test file that cannot be read says nothing about numbers
        return Outcome(None, (done.stdout + done.stderr).strip()[-2000:], seconds)
    return Outcome(None, seconds=seconds)


def copied(folder: str) -> Path:
    """Copy what the tests need to `folder`."""
    root = Path(folder)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        elif source.exists():
            shutil.copy(source, root / name)
    return root


def tried(mutation: Mutation) -> Outcome:
    """Make a mistake in a copy and run the tests of its subject."""
    with tempfile.TemporaryDirectory(prefix="clrun-mutation-") as folder:
        root = copied(folder)
        mutation.apply(root)
        return tested(root, mutation.tests)


def line(mutation: Mutation, outcome: Outcome, *, markdown: bool) -> str:
    """Return the row of a mutation in the table."""
    verdict = "BROKEN" if outcome.broken else outcome.by or "SURVIVED"
    if markdown:
        short = re.sub(r"^\w+/(\w+)\.py|\[.*", r"\1", verdict)
        return f"| `{mutation.file}` | {mutation.effect} | {mutation.kind} | `{short}` |"
    where = f"{mutation.file}: {mutation.effect}"
    return f"{mutation.name:21} {mutation.kind:13} {outcome.seconds:5.0f} s  {verdict}\n{'':42} {where}"


def main() -> int:
    """Run what was asked for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--jobs", type=int, default=1, help="mutations tried at once")
    parser.add_argument("--list", action="store_true", help="print the mutations and run nothing")
    parser.add_argument("--markdown", action="store_true", help="print the table as in docs/testing.md")
    arguments = parser.parse_args()
    names = [name for name in arguments.only.split(",") if name]
    if unknown := set(names) - {m.name for m in MUTATIONS}:
        parser.error(f"no such mutation: {', '.join(sorted(unknown))}")
    chosen = [m for m in MUTATIONS if not names or m.name in names]
    if stale := [m.name for m in chosen if m.found() != 1]:
        parser.error(f"the old text is not there exactly once: {', '.join(stale)}")
    if arguments.list:
        for m in chosen:
            print(f"{m.name:21} {m.kind:13} {m.file}: {m.effect}\n  - {m.old}\n  + {m.new}")
        return 0
    with tempfile.TemporaryDirectory(prefix="clrun-mutation-") as folder:
        plain = tested(copied(folder), tuple(dict.fromkeys(file for m in chosen for file in m.tests)))
    if plain.by or plain.broken:
        print(f"without a mutation: {plain.by or plain.broken}", file=sys.stderr)
        return 2
    print(f"without a mutation all pass ({plain.seconds:.0f} s)", file=sys.stderr)
    if arguments.markdown:
        print("| file | mistake | kind | caught by |\n| --- | --- | --- | --- |")
    caught, broken = 0, []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for mutation, outcome in zip(chosen, pool.map(tried, chosen), strict=True):
            print(line(mutation, outcome, markdown=arguments.markdown), flush=True)
            caught += outcome.by is not None
            broken += [f"{mutation.name}: {outcome.broken}"] if outcome.broken else []
    for text in broken:
        print(text, file=sys.stderr)
    print(f"{caught} of {len(chosen)} caught ({100 * caught / len(chosen):.0f} %)", file=sys.stderr)
    return 0 if caught >= CAUGHT * len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Merging of networks: one is trained per task, and a rule makes one network of all of them.

Rules and sources: mean (model soups, Wortsman et al., ICML 2022, arXiv 2203.05482), fisher (Matena and Raffel, NeurIPS
2022, arXiv 2111.09832), regmean (Jin et al., ICLR 2023, arXiv 2212.09849), imm_mean and imm_mode (Lee et al., NeurIPS
2017, arXiv 1703.08475), task_arithmetic (arXiv 2212.04089), ties (arXiv 2306.01708), dare (arXiv 2311.03099), magmax
(arXiv 2407.06322), opcm, dop (code FusionBench), wise_ft (arXiv 2109.01903; with anchor=previous CoMA and CoFiMA, arXiv
2312.08977), ema. Deviations stand at the rules in `clrun.blocks.merging`.

Memory between tasks, in numbers for the P parameters of the backbone, each of 4 bytes with sums=single and of 8 to 16
bytes in sums with sums=exact: mean, imm_mean, task_arithmetic, magmax, opcm, dop, wise_ft and ema 1 P; fisher, imm_mode
and wise_ft with Fisher information 2 P; ties 2 P and 2 bytes per parameter; dare those of its inner rule; regmean I
(I + O) for each layer with I inputs, the constant of a bias included, and O outputs, and 1 for every other parameter.
The initial weights take P more (4 bytes each) for rules of task vectors, for wise_ft with anchor=initial, for dop, and
with train_from=initial; train_from=previous takes P for the last trained weights. Task id: not needed.

Verified: task by task equals all networks at once, the order of tasks changes no bit where the rule commutes and tasks
start from the initial weights, and wise_ft with alpha 1 is finetuning bit for bit (test_blocks_merging,
test_methods_merging).
"""

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from clrun.blocks import merging
from clrun.blocks.curvature import Labels
from clrun.learning.losses import Compete
from clrun.methods.merged import Merged, Start, Sums
from clrun.system.errors import ConfigError, PositiveInt, warn

Rule = Literal[
    "mean",
    "fisher",
    "regmean",
    "regmean_pp",
    "imm_mean",
    "imm_mode",
    "task_arithmetic",
    "ties",
    "dare",
    "magmax",
    "opcm",
    "dop",
    "wise_ft",
    "ema",
]


class Merge(Merged):
    """Train on each task by cross-entropy, add the network to the rule, predict with the merge; see `Merged`.

    Args:
        backbone: maps prepared images to features [B, D].
        num_classes: C.
        rule: name of the rule; the options of the rules below are used by the rule of that name. "regmean_pp" is
            RegMean++, with the options of regmean; it needs all networks at once, and is for `clrun merge` alone.
        train_from: the weights that a task starts from, see `Merged`.
        fisher: options of rule=fisher.
        regmean: options of rule=regmean.
        task_arithmetic: options of rule=task_arithmetic.
        ties: options of rule=ties.
        dare: options of rule=dare.
        magmax: options of rule=magmax.
        opcm: options of rule=opcm.
        dop: options of rule=dop.
        wise_ft: options of rule=wise_ft.
        ema: options of rule=ema.
        labels: how the labels of the Fisher information are chosen, see `clrun.blocks.curvature.estimate`.
        samples: number of rows of the task for Fisher information and second moments; None for all.
        modules: patterns for the parameters that are trained and merged, see `Merged`.
        sums: how sums are stored, "exact" or "single".
        compete: classes that compete in the training loss, see `clrun.learning.losses`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        rule: Rule,
        train_from: Start,
        fisher: merging.FisherMean,
        regmean: merging.RegMean,
        task_arithmetic: merging.TaskArithmetic,
        ties: merging.Ties,
        dare: merging.Dare,
        magmax: merging.MagMax,
        opcm: merging.Opcm,
        dop: merging.Dop,
        wise_ft: merging.Interpolate,
        ema: merging.Ema,
        labels: Labels,
        samples: PositiveInt | None,
        modules: list[str],
        sums: Sums,
        compete: Compete,
    ) -> None:
        rules: dict[str, Any] = {"mean": merging.Mean(), "imm_mean": merging.ImmMean(), "imm_mode": merging.ImmMode()}
        rules |= {"fisher": fisher, "regmean": regmean, "task_arithmetic": task_arithmetic, "ties": ties}
        rules |= {"magmax": magmax, "opcm": opcm, "dop": dop, "wise_ft": wise_ft, "ema": ema}
        rules["regmean_pp"] = regmean
        rules["dare"] = dare.with_rule(rules[dare.name])
        super().__init__(
            backbone,
            num_classes,
            rule=rules[rule],
            train_from=train_from,
            labels=labels,
            samples=samples,
            modules=modules,
            sums=sums,
            compete=compete,
        )

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        if options.get("rule") == "regmean_pp":
            raise ConfigError(
                "method.rule=regmean_pp: merges all networks at once, not one after the other; train runs with "
                "job.save_model=true, then clrun merge RUN RUN rule=regmean_pp"
            )
        if options.get("train_from") == "runs":
            raise ConfigError(
                "method.train_from=runs: is for the networks of finished runs, which clrun merge RUN RUN merges; set "
                "method.train_from=initial, previous or merged"
            )
        if options.get("rule") in ("task_arithmetic", "ties", "dare") and options.get("train_from") == "previous":
            warn(
                f"method.rule={options['rule']} with method.train_from=previous: each task vector contains those "
                "before it, so that their sum counts early tasks many times; method.train_from=initial trains "
                "independent networks, and method.rule=magmax is made for a chain"
            )

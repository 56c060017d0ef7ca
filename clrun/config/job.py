"""The options of a run as a whole (`job`), and how the run was started."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from clrun.system.errors import ConfigError, Positive, PositiveInt

When = Literal["none", "final", "each_task"]


@dataclass(frozen=True)
class Job:
    """Limits, evaluation and files of a run.

    Attributes:
        resume: continue from the checkpoint found in the run's folder. Without it the run begins anew, and a method
            whose state no checkpoint can store may run.
        checkpoint_minutes: minutes between two checkpoints within a task (`clrun.running.task_fits`), for runs that
            resume; null writes one after each task only.
        keep_checkpoint: keep the checkpoint of a completed run.
        progress: show bars and lines on the terminal.
        picture: draw accuracy_matrix.png.
        save_model: write the final weights to model.safetensors.
        save_predictions: write the prediction for every evaluated row to predictions.csv: never, after the last task,
            or after each task for all tasks learned so far. `clrun.running.predictions` describes the file.
        save_logits: the same for logits, in the files logits/after_N.npz (N tasks learned).
        feature_cache: folder in which features of frozen backbones are stored; true is the default folder, false stores
            none.
        feature_cache_gb: size limit of that folder in GB; the features used least recently make room for new ones.
        mode: "run"; "dry_run" prints what the run would do, "preview" draws samples of the data, and neither trains.
        eval_initial: evaluate the untrained learner and unseen tasks (domain-incremental only).
        eval_unseen: also evaluate every task before it is learned, for methods that know classes by their names: within
            its own classes ("til"), and among all classes ("cil", "open").
        eval_extra: data sets that are never learned, to evaluate by their names of classes before the first and after
            each task: names of `dataset=NAME`, or nodes with a `_target_`. They arrive here as loaders.
        eval_every: number of optimizer steps between evaluations within a task; null evaluates after tasks only.
        eval_split: rows to evaluate on.
        eval_batch_size: rows per evaluation batch.
        max_tasks: learn only the first tasks, at most this many; null learns all.
        start_from: folder of a complete run to go on from in a new folder, with a larger `max_tasks` or another length
            of the budget (`clrun.running.start_from`); null begins with the first task.
        max_steps: upper limit of the steps of each fit; null for none.
        max_eval_rows: evaluate at most this many rows per task; null for all.
        tuning: chooses hyper-parameters for each task (`clrun.running.tuning`); null learns each task once, as
            configured.

    Raises:
        ConfigError: two options exclude each other.
    """

    resume: bool
    checkpoint_minutes: Positive | None
    keep_checkpoint: bool
    progress: bool
    picture: bool
    save_model: bool
    save_predictions: When
    save_logits: When
    feature_cache: bool | str
    feature_cache_gb: Positive
    mode: Literal["run", "dry_run", "preview"]
    eval_initial: bool
    eval_unseen: bool
    eval_extra: list[Any]
    eval_every: PositiveInt | None
    eval_split: Literal["test", "val"]
    eval_batch_size: PositiveInt
    max_tasks: PositiveInt | None
    start_from: str | None
    max_steps: PositiveInt | None
    max_eval_rows: PositiveInt | None
    tuning: Callable[..., Any] | None

    def __post_init__(self) -> None:
        """Refuse options that exclude each other."""
        if self.tuning is not None and self.eval_every is not None:
            raise ConfigError(
                "job.eval_every: excludes job.tuning, which learns each task several times; set one of them to null"
            )


@dataclass(frozen=True)
class JobInfo:
    """How a run was started.

    Attributes:
        number: number of the job in its sweep; None for a single run.
        parallel: number of jobs of the sweep that run on this machine at the same time.
        choices: chosen member of each configuration group.
        sweep: whether the run belongs to a sweep.
        overrides: command-line overrides of the run, without those of Hydra's own options.
        hydra: Hydra's record of the run: file names and texts for the folder `.hydra`.
        recorded: the configuration as files have it, with the expression in the place of each value from the
            environment; None when it has no such value.
        secrets: the expression of each value from the environment; never written.
    """

    number: int | None
    parallel: int
    choices: dict[str, str]
    sweep: bool
    overrides: list[str]
    hydra: dict[str, str]
    recorded: dict[str, Any] | None = None
    secrets: dict[str, str] = field(default_factory=dict, repr=False)

"""Second-order optimizers for `budget.optimizer`: K-FAC, FOOF and M-FAC.

An optimizer that needs more than gradients has a method `watch(method, ctx)`: a context manager that `fit` enters
before its first step and leaves after its last. Statistics are averaged over the processes, so that all processes take
the same step.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clrun.blocks.curvature import (
    Composite,
    Curvature,
    Diagonal,
    GradientWindow,
    KroneckerFactored,
    Sharing,
    Tape,
    layers_of,
    named_too_large,
)
from clrun.blocks.curvature.kronecker import as_matrix, as_vector
from clrun.blocks.curvature.layers import Layer, has_bias, inner_sum, inputs, real_of, sides
from clrun.blocks.params import Params, flatten, shapes_of, unflatten
from clrun.learning.context import Context
from clrun.learning.method import Method
from clrun.learning.names import NamesHead
from clrun.system.errors import ConfigError, Fraction, NonNegative, Positive, PositiveInt, warn

Groups = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


def needs_sgd(
    optimizer: Callable[..., Optimizer], who: str, *, instead: str = "use budget=sgd", **options: float
) -> None:
    """Refuse an optimizer that is not plain `torch.optim.SGD` with the given options.

    Args:
        optimizer: the optimizer of a budget, a partial whose keywords are its options.
        who: the method or option that needs SGD, for the message.
        instead: the advice of the message.
        options: required values of options of SGD; an option that the partial does not set has the value 0.

    Raises:
        ConfigError: the optimizer or one of the options differs.
    """
    function, given = getattr(optimizer, "func", optimizer), getattr(optimizer, "keywords", {})
    if function is not torch.optim.SGD:
        name = getattr(function, "__name__", function)
        raise ConfigError(f"{who}: needs budget.optimizer=torch.optim.SGD, not {name}; {instead}")
    for key, value in options.items():
        if given.get(key, 0) != value:
            raise ConfigError(f"budget.optimizer.{key}={given.get(key, 0)}: {who} needs {value:g}")


class _Preconditioned(Optimizer):
    """Base of optimizers that multiply gradients by a matrix per layer, estimated from statistics during training.

    Args:
        params: parameters, or parameter groups of torch.
        lr: learning rate.
        weight_decay: coefficient of the weights that are added to the gradient.
    """

    not_state = ("names", "method", "context", "layers", "tape")  # `watch` sets them again

    def __init__(self, params: Groups, *, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.names: dict[str, nn.Parameter] = {}
        self.steps = 0
        self.sums: Params = {}  # statistics of this step, summed over rows
        self.rows = 0.0  # number of these rows
        self.method: Method | None = None
        self.context: Context | None = None

    @classmethod
    def look_at(cls, method: Method, *, largest: int, **options: Any) -> None:
        """Warn of the layers that are too large for factors; called once before anything is written.

        Args:
            method: the method before its first task.
            largest: see the class.
            options: all others of the optimizer.
        """
        if message := named_too_large(method, largest, "budget.optimizer.largest"):
            warn(message)

    def _begin(self, method: Method, ctx: Context, largest: int) -> dict[str, Layer]:
        """Store the names of the optimised parameters, and return the layers whose weights are among them, by name."""
        own = {id(p) for group in self.param_groups for p in group["params"]}
        self.names = {name: p for name, p in method.named_parameters() if id(p) in own}
        self.method, self.context = method, ctx
        name = f"budget.optimizer={type(self).__name__}"
        if len(self.names) < len(own):
            raise ConfigError(
                f"{name}: this method trains parameters outside its named_parameters(); use another budget"
            )
        if ctx.hardware.compile:
            raise ConfigError(f"{name}: compiled code hides the inputs of layers; set hardware.compile=false")
        layers = layers_of(method, largest=largest)
        return {name: layer for name, layer in layers.items() if f"{name}.weight" in self.names}

    def _means(self) -> Params:
        """Return the means of this step's statistics over the rows of all processes, and set the sums to 0."""
        assert self.context is not None
        hardware = self.context.hardware
        sums, rows = self.sums, self.rows
        if hardware.world > 1:
            flat = hardware.sum(torch.cat([flatten(sums), flatten(sums).new_tensor([rows])]))
            sums, rows = unflatten(flat[:-1], shapes_of(sums)), float(flat[-1])
        self.sums, self.rows = {name: torch.zeros_like(t) for name, t in self.sums.items()}, 0.0
        return {name: total / max(1.0, rows) for name, total in sums.items()}

    def _decayed(self) -> Params:
        """Return the gradients plus weight decay by name; a missing gradient counts as 0."""
        decay = {id(p): group["weight_decay"] for group in self.param_groups for p in group["params"]}
        return {
            name: (torch.zeros_like(p) if p.grad is None else p.grad).add(p, alpha=decay[id(p)])
            for name, p in self.names.items()
        }

    def _move(self, directions: Params, scale: float = 1.0) -> None:
        """Subtract scale * lr * direction from each parameter; parameters without a gradient do not change."""
        rates = {id(p): group["lr"] for group in self.param_groups for p in group["params"]}
        for name, direction in directions.items():
            parameter = self.names[name]
            if parameter.grad is not None:
                parameter.add_(direction, alpha=-scale * rates[id(parameter)])
        self.steps += 1


class Kfac(_Preconditioned):
    """Natural gradient with Kronecker factors (K-FAC, Martens and Grosse, ICML 2015, arXiv 1503.05671).

    A layer with the Kronecker factors G and A (see `clrun.blocks.curvature.kronecker`) has the step
    W <- W - lr (G + c/pi I)^-1 grad (A + pi c I)^-1, where c^2 = damping and pi balances the two factors. The factors
    are those of the Fisher information and not of the empirical Fisher: labels are drawn from the predictions of the
    method, which takes one more backward pass whenever the statistics are updated. Predictions are probabilities over
    the classes that compete in the current task. All parameters that are not in a layer with Kronecker factors have a
    diagonal Fisher, estimated in the same pass as B times the square of the mean gradient over the B rows of a batch.

    Deviations from the paper: momentum is heavy-ball, and its coefficient and the damping are constant.

    Args:
        params: parameters, or parameter groups of torch.
        lr: learning rate.
        momentum: heavy-ball momentum of the preconditioned gradient.
        weight_decay: coefficient of the weights that are added to the gradient before it is preconditioned.
        damping: multiple of the identity that is added to the curvature, distributed over the factors.
        average: decay of the running averages of the factors.
        sharing: "expand" or "reduce"; how positions share a weight, see `clrun.blocks.curvature.layers`.
        largest: largest number of inputs or outputs of a layer with Kronecker factors.
        statistics_every: number of steps between two updates of the factors.
        invert_every: number of steps between two inversions.
        kl_clip: upper bound of lr^2 d'Fd for a step in direction d with the Fisher F, which bounds the change of the
            predictions; longer steps are scaled down. None for no bound.
    """

    def __init__(
        self,
        params: Groups,
        *,
        lr: NonNegative,
        momentum: Fraction,
        weight_decay: NonNegative,
        damping: Positive,
        average: Fraction,
        sharing: Sharing,
        largest: PositiveInt,
        statistics_every: PositiveInt,
        invert_every: PositiveInt,
        kl_clip: Positive | None,
    ) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.momentum, self.damping, self.average = momentum, damping, average
        self.sharing, self.largest = sharing, largest
        self.statistics_every, self.invert_every, self.kl_clip = statistics_every, invert_every, kl_clip
        self.layers: Mapping[str, Layer] = {}
        self.factors: Params = {}
        self.curvature: Curvature | None = None
        self.preconditioner: Curvature | None = None
        self.velocity: Tensor | None = None

    @classmethod
    def look_at(cls, method: Method, *, largest: int, **options: Any) -> None:
        """Refuse a method that encodes names of classes with the layers of these statistics, see the base class.

        A layer that is called on B rows of a batch and on K names has no rows in common for both.

        Raises:
            ConfigError: see above.
        """
        layers = {id(layer.weight) for layer in layers_of(method, largest=largest).values()}
        for part in method.modules():
            if isinstance(part, NamesHead) and part.names == "live" and layers & {id(p) for p in part.sources()}:
                raise ConfigError(
                    "budget.optimizer=Kfac: its factors would mix the rows of a batch with the names of classes, which "
                    "the same step encodes; use budget=foof or another budget, or keep the text tower fixed "
                    "(backbone.head=fixed)"
                )
        super().look_at(method, largest=largest, **options)

    @contextmanager
    def watch(self, method: Method, ctx: Context) -> Iterator[None]:
        """Collect statistics in the forward passes of `method` in training mode, within the `with` block."""
        tape = Tape(self._begin(method, ctx, self.largest), method, training=True)
        self.layers = tape.layers
        self._clear()

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            due = self.steps % self.statistics_every == 0 and not self.rows
            tape.on = due and module.training and torch.is_grad_enabled()

        def after(module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> None:
            if tape.on:
                tape.on = False
                self._collect(tape, logits.float())
                tape.calls.clear()

        handles = [method.register_forward_pre_hook(before), method.register_forward_hook(after)]
        try:
            with tape.recording():
                tape.on = False
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _clear(self) -> None:
        """Set all statistics to 0: the sums of A_n and G_n of each layer, and the diagonal of all other parameters."""
        self.sums = {}
        for name, layer in self.layers.items():
            for key, side in zip(("outer", "inner"), sides(layer), strict=True):
                self.sums[f"{name}:{key}"] = layer.weight.new_zeros(side, side)
        covered = {f"{name}.{kind}" for name in self.layers for kind in ("weight", "bias")}
        self.sums |= {name: torch.zeros_like(p) for name, p in self.names.items() if name not in covered}

    def _collect(self, tape: Tape, logits: Tensor) -> None:
        """Set the statistics of this step to those of a recorded forward pass with these logits [B, C]."""
        ctx, method = self.context, self.method
        assert ctx is not None and method is not None
        mask = method.competing(torch.full((len(logits),), ctx.task.index, device=logits.device), ctx)
        noise = torch.empty(mask.shape).exponential_(generator=ctx.generator("kfac", ctx.hardware.rank))
        p = logits.detach().masked_fill(~mask, float("-inf")).softmax(dim=1)
        draw = (p / noise.to(p.device)).argmax(dim=1)
        directions = torch.eye(p.shape[1], device=p.device)[draw] - p
        rest = {name: self.names[name] for name in self.sums if name in self.names}
        if rest:
            found = torch.autograd.grad(
                logits, list(rest.values()), directions, retain_graph=True, materialize_grads=True
            )
            self.sums |= {name: grad.square() for name, grad in zip(rest, found, strict=True)}
        if tape.calls:
            self.sums |= {f"{n}:inner": part for n, part in tape.inner(self.sharing, len(logits)).items()}
            outer = tape.outer(logits, directions, self.sharing, keep=True)
            self.sums |= {f"{n}:outer": part for n, part in outer.items()}
        self.rows = float(len(logits))

    def _build(self) -> Composite:
        """Return the curvature of the running averages; a layer that was never called has the factors I."""
        parts: list[Curvature] = []
        for name, layer in self.layers.items():
            own = [f"{name}.weight", *([f"{name}.bias"] if has_bias(layer) else [])]
            outer, inner = self.factors[f"{name}:outer"], self.factors[f"{name}:inner"]
            if not inner.any():
                outer, inner = (torch.eye(len(f)).to(f) for f in (outer, inner))
            parts.append(KroneckerFactored({n: tuple(self.names[n].shape) for n in own}, outer, inner))
        rest = {name: value for name, value in self.factors.items() if name in self.names}
        return Composite.of([*parts, *([Diagonal.of(rest)] if rest else [])])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step; `closure` is ignored.

        Raises:
            ConfigError: no logits of a training batch were computed by calling the method.
        """
        if self.steps % self.statistics_every == 0:
            self.factors = _average(self.factors, self._means(), self.average)
        if self.curvature is None or self.steps % self.invert_every == 0:
            if not any(factor.any() for factor in self.factors.values()):
                raise ConfigError(
                    "budget.optimizer: Kfac needs the logits of training batches from a call of the method, and this "
                    "method computes them in another way; use budget=foof or budget=m_fac"
                )
            self.curvature = self._build()
            self.preconditioner = self.curvature.inverse(self.damping, "factored")
        assert self.preconditioner is not None
        direction = self.preconditioner.mv(self.preconditioner.vector(self._decayed()))
        if self.momentum:
            self.velocity = direction if self.velocity is None else self.momentum * self.velocity + direction
            direction = self.velocity
        scale = 1.0
        if self.kl_clip is not None:
            change = float(self.param_groups[0]["lr"]) ** 2 * self.curvature.quad(direction)
            scale = float((self.kl_clip / change).sqrt().clamp(max=1)) if change > 0 else 1.0
        self._move(self.preconditioner.params(direction), scale)


class Foof(_Preconditioned):
    """Gradient descent on neurons (FOOF, Benzing, ICML 2022, arXiv 2201.12250).

    A linear or convolutional layer has the step W <- W - lr grad (A + damping I)^-1, where A is the second moment of
    its inputs. All other parameters have the step for A = I, with learning rate lr / (1 + damping). lr / damping
    corresponds roughly to the learning rate of SGD.

    Args:
        params: parameters, or parameter groups of torch.
        lr: learning rate.
        momentum: heavy-ball momentum of the gradient, before it is preconditioned.
        weight_decay: coefficient of the weights that are added to the gradient.
        damping: multiple of the identity that is added to A.
        average: decay of the running average of A.
        largest: largest number of inputs or outputs of a layer that is preconditioned.
        statistics_every: number of steps between two updates of A.
        invert_every: number of steps between two inversions.
    """

    def __init__(
        self,
        params: Groups,
        *,
        lr: NonNegative,
        momentum: Fraction,
        weight_decay: NonNegative,
        damping: Positive,
        average: Fraction,
        largest: PositiveInt,
        statistics_every: PositiveInt,
        invert_every: PositiveInt,
    ) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.momentum, self.damping, self.average, self.largest = momentum, damping, average, largest
        self.statistics_every, self.invert_every = statistics_every, invert_every
        self.moments: Params = {}
        self.inverses: Params = {}
        self.velocity: Params = {}

    @contextmanager
    def watch(self, method: Method, ctx: Context) -> Iterator[None]:
        """Record the inputs of the layers of `method` in training mode, within the `with` block."""
        self.tape = Tape(self._begin(method, ctx, self.largest), method, training=True)
        with self.tape.recording():
            self.tape.on = self.steps % self.statistics_every == 0
            yield

    def _collect(self) -> None:
        """Set the statistics of this step to those of its recorded batches: A and the number of rows of each layer."""
        for name, layer in self.tape.layers.items():
            side = sides(layer)[1]
            self.sums[name], self.sums[f"{name}:rows"] = layer.weight.new_zeros(side, side), layer.weight.new_zeros(1)
            for call in self.tape.calls.get(name, []):
                x = inputs(layer, call.x, len(call.x))
                self.sums[name] += inner_sum(x, "expand", real_of(x, call.real))
                self.sums[f"{name}:rows"] += len(x)

    def _renew(self) -> None:
        """Move the running averages towards the statistics of this step."""
        self._collect()
        means = self._means()
        called = {name: means[f"{name}:rows"] for name in self.tape.layers if means[f"{name}:rows"] > 0}
        new = {name: means[name] / rows for name, rows in called.items()}
        self.moments |= _average({name: self.moments[name] for name in new if name in self.moments}, new, self.average)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step; `closure` is ignored."""
        if self.tape.on:
            self._renew()
        if not self.steps % self.invert_every or self.moments.keys() - self.inverses.keys():
            for name, moment in self.moments.items():
                damped = moment.double() + self.damping * torch.eye(len(moment)).to(moment)
                self.inverses[name] = torch.cholesky_inverse(torch.linalg.cholesky(damped)).to(moment.dtype)
        grads = self._decayed()
        if self.momentum:
            self.velocity = {
                n: g if n not in self.velocity else self.momentum * self.velocity[n] + g for n, g in grads.items()
            }
            grads = self.velocity
        directions = {name: grad / (1 + self.damping) for name, grad in grads.items()}
        for name, inverse in self.inverses.items():
            own = [f"{name}.weight", *([f"{name}.bias"] if has_bias(self.tape.layers[name]) else [])]
            shapes = {n: tuple(grads[n].shape) for n in own}
            matrix = as_matrix(flatten({n: grads[n] for n in own}), shapes) @ inverse
            directions |= unflatten(as_vector(matrix, shapes), shapes)
        self._move(directions)
        self.tape.calls.clear()
        self.tape.on = self.steps % self.statistics_every == 0


class MFac(Optimizer):
    """Natural gradient with the empirical Fisher of the last gradients (M-FAC, Frantar et al., NeurIPS 2021).

    The step is theta <- theta - lr F^-1 g with F = damping I + 1/m sum_i g_i g_i', where g_i are the last m gradients
    including the present gradient g. As in the paper these are gradients of mini-batches, so that F depends on the
    batch size. The memory holds m gradients, each with one number of 4 bytes per trained parameter.

    Args:
        params: parameters, or parameter groups of torch.
        lr: learning rate.
        weight_decay: coefficient of the weights that are added to g.
        damping: lambda of the paper.
        gradients: m.
    """

    def __init__(
        self, params: Groups, *, lr: NonNegative, weight_decay: NonNegative, damping: Positive, gradients: PositiveInt
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.damping, self.length = damping, gradients
        self.window: GradientWindow | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step; `closure` is ignored."""
        moved = [(p, group) for group in self.param_groups for p in group["params"]]
        g = torch.cat(
            [
                (torch.zeros_like(p) if p.grad is None else p.grad).add(p, alpha=group["weight_decay"]).flatten()
                for p, group in moved
            ]
        )
        if self.window is None:
            self.window = GradientWindow(self.length, len(g), self.damping, g)
        self.window.insert(g)
        parts = torch.split(self.window.solve(g), [p.numel() for p, _ in moved])
        for (p, group), part in zip(moved, parts, strict=True):
            if p.grad is not None:
                p.add_(part.view_as(p), alpha=-group["lr"])


def _average(past: Params, new: Params, decay: float) -> Params:
    """Return the running averages decay * past + (1 - decay) * new by name; a name without a past has its new value."""
    return {name: torch.lerp(value, past[name], decay) if name in past else value for name, value in new.items()}

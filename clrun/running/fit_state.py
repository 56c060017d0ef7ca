"""The state of a running or finished fit as bytes, and its way back into the live objects of the fit.

The bytes are a pickle of the learner, of the optimizer's and the schedule's numbers, and of the random numbers,
which torch's restricted unpickler reads (`clrun.running.checkpoint`). Tensors of the learner that still are as the
configuration loads them are stored by their digest.
"""

import io
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from clrun.learning.progress import Running
from clrun.running import checkpoint
from clrun.running.object_graph import Anchors, Changed, graft, walk, without_hooks
from clrun.system.digests import tensor_digest
from clrun.system.hardware import Hardware

Draws = dict[str, Any]
BASE = {"state", "param_groups", "defaults"}  # attributes of every optimizer


class FitState:
    """Stores and restores one fit.

    Args:
        running: the fit, before its first step.
        hardware: device of the run.
    """

    def __init__(self, running: Running, hardware: Hardware) -> None:
        self.running, self.hardware = running, hardware
        self.anchors = Anchors(running.method, running.further)
        own = {id(running.generators): running.generators}
        own |= {id(context.generators): context.generators for context in self.anchors.contexts}
        self.generators = list(own.values())
        self.pass_draws = self.draws()  # when the current pass over the split began

    # --- random numbers

    def draws(self) -> Draws:
        """Return the states of all generators of random numbers."""
        name, keys, *rest = np.random.get_state()
        return {
            "python": random.getstate(),
            "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if self.hardware.device.startswith("cuda") else None,
            "contexts": [{key: g.get_state() for key, g in own.items()} for own in self.generators],
        }

    def set_draws(self, draws: Draws) -> None:
        """Set the states of all generators of random numbers; a generator that is missing is made."""
        name, keys, *rest = draws["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        random.setstate(draws["python"])
        torch.set_rng_state(draws["torch"])
        if draws["cuda"] is not None:
            torch.cuda.set_rng_state(draws["cuda"])
        for own, states in zip(self.generators, draws["contexts"], strict=True):
            for key, state in states.items():
                own.setdefault(key, torch.Generator()).set_state(state)

    # --- the state

    def pack(self, backbone: Mapping[str, str], *, finished: bool) -> bytes:
        """Return the present state as bytes.

        Args:
            backbone: digests of the networks as loaded (`clrun.running.checkpoint.fingerprints`).
            finished: whether the fit is over, so that its optimizer and position are not needed.

        Raises:
            Unstorable: something in it cannot be pickled.
        """
        running = self.running
        optimizer = None if finished else optimizer_state(running.optimizer)
        core = {"method": running.method, "optimizer": optimizer}
        nodes = walk(core)
        buffer = io.BytesIO()
        unwritten = self.anchors.unwritten
        with without_hooks(nodes), checkpoint.by_reference(running.method, backbone, unwritten) as referenced:
            content = {
                "core": core,
                "places": self.anchors.places(nodes),
                "on_device": [k for k, n in enumerate(nodes) if isinstance(n, Tensor) and n.device.type != "cpu"],
                "referenced": referenced,
                "anchors": len(self.anchors),
                "contents": self.anchors.contents(),
                "draws": self.draws(),
                "pass_draws": None if finished else self.pass_draws,
                "schedule": None if finished or running.schedule is None else running.schedule.state_dict(),
                "progress": (running.progress.step, running.progress.epoch, running.progress.lr),
            }
            checkpoint.dump(content, buffer)
        return buffer.getvalue()

    def unpack(self, content: Mapping[str, Any]) -> None:
        """Make the live objects what they were when `content` was packed.

        Args:
            content: what was packed, as the restricted unpickler has read it.

        Raises:
            Changed: the fit is not the one that was stored.
        """
        running, core = self.running, content["core"]
        if content["anchors"] != len(self.anchors):
            raise Changed(f"it begins with {len(self.anchors)} objects and began with {content['anchors']}")
        self._refer(core["method"], content["referenced"])
        core = graft(core, content["places"], content["on_device"], self.anchors, self.hardware.device)
        self.anchors.fill(content["contents"])
        if core["optimizer"] is not None:
            set_optimizer_state(running.optimizer, core["optimizer"])
            self.pass_draws = content["pass_draws"]
        if running.schedule is not None and content["schedule"] is not None:
            running.schedule.load_state_dict(content["schedule"])
        self.set_draws(content["draws"])
        running.progress.step, running.progress.epoch, running.progress.lr = content["progress"]

    def _refer(self, stored: Any, referenced: Mapping[str, str]) -> None:
        """Give the stored learner those tensors of the live one that were stored by their digest.

        Raises:
            Changed: the live ones are others.
        """
        empty, live = checkpoint.tensors_of(stored), checkpoint.tensors_of(self.running.method)
        for name, digest in referenced.items():
            if name not in empty or name not in live or tensor_digest(live[name]) != digest:
                raise Changed(f"the tensor {name} is another one")
            empty[name].data = live[name].data


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return the state of an optimizer without its parameters: by parameter, by group, and in further attributes."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    states = [optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"]]
    hidden = (*BASE, *getattr(optimizer, "not_state", ()))
    further = {
        name: value
        for name, value in vars(optimizer).items()
        if name not in hidden and not name.startswith("_") and not callable(value)
    }
    return {"groups": groups, "states": states, "further": further}


def set_optimizer_state(optimizer: Optimizer, stored: Mapping[str, Any]) -> None:
    """Give a new optimizer the state that `optimizer_state` returned."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for group, values in zip(optimizer.param_groups, stored["groups"], strict=True):
        group.update(values)
    for parameter, state in zip(parameters, stored["states"], strict=True):
        if state:
            optimizer.state[parameter] = state
    for name, value in stored["further"].items():
        setattr(optimizer, name, value)

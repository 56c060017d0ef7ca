"""What methods put into a frozen vision transformer or project out of gradients, written out for bench_families.

Each function gets a method in its third task, ready to learn, and returns a `Bare`: copies of its network and of what
it trains, and the arithmetic of a step in plain calls of torch. Shapes, ranks and numbers of earlier modules are read
from the method.
"""

import copy
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def nothing(*args: Any) -> None:
    """Do nothing."""


@dataclass
class Bare:
    """A network with its head, and the arithmetic of a step besides its passes.

    Attributes:
        body: maps prepared images to features.
        head: maps features to logits; it is trained.
        trained: further parameters that are trained.
        term: returns a further term of the loss from the features and the images, or None.
        project: changes the gradients before the optimizer step.
        settle: acts after the optimizer step.
    """

    body: Callable[[Tensor], Tensor]
    head: nn.Module
    trained: list[nn.Parameter] = field(default_factory=list)
    term: Callable[[Tensor, Tensor], Tensor | None] = nothing
    project: Callable[[], None] = nothing
    settle: Callable[[], None] = nothing

    def parameters(self) -> list[nn.Parameter]:
        """Return all that is trained."""
        return [*self.trained, *(p for p in self.head.parameters() if p.requires_grad)]


def frozen(method: Any) -> tuple[Any, nn.Module]:
    """Return a frozen copy of the backbone in eval mode, and a copy of the head."""
    vit = copy.deepcopy(method.backbone).requires_grad_(False).eval()
    return vit, copy.deepcopy(method.head).train()


def sum_of(downs: list[Tensor], ups: list[Tensor], gains: Callable[[], Iterable[Tensor]] | None) -> Any:
    """Return a hook that adds updates of queries and values, or keys and values, as one of their ranks together."""

    def change(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        scaled = ups if gains is None else [g[:, None, None] * up for g, up in zip(gains(), ups, strict=True)]
        down, up = (torch.cat(downs, 1), torch.cat(scaled, 2)) if len(downs) > 1 else (downs[0], scaled[0])
        inner = F.linear(args[0], down.flatten(0, 1)).chunk(len(down), dim=-1)
        first, second = (F.linear(inner[k % len(inner)], up[k]) for k in range(2))
        zero = torch.zeros_like(first)
        parts = [zero, first, second] if len(down) == 1 else [first, zero, second]  # InfLoRA: keys and values share A
        return y + torch.cat(parts, dim=-1)

    return change


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return copies, of which those that are trained are parameters."""
    return [nn.Parameter(t.detach().clone(), requires_grad=t.requires_grad) for t in tensors]


def updated(method: Any) -> Bare:
    """LoRA of all tasks as one sum: `lora`, `o_lora` with its penalty, `inflora`, and `sd_lora` with its magnitudes."""
    (vit, head), found, older = frozen(method), list[Tensor](), list[tuple[Tensor, Tensor]]()
    alphas = copies(getattr(method, "magnitudes", []))
    for path, total in method.by_path().items():
        downs, ups = copies(u.down for u in total), copies(u.up for u in total)
        inverse = getattr(total, "inverse", None)
        gains = None if inverse is None else (lambda own=inverse: (a * row for a, row in zip(alphas, own, strict=True)))
        vit.get_submodule(path).register_forward_hook(sum_of(downs, ups, gains))
        found += [*downs, *ups]
        older += [(torch.cat([d[part] for d in downs[:-1]]), downs[-1][part]) for part in range(2) if len(downs) > 1]
    strength = getattr(method, "orthogonality", 0.0)

    def term(features: Tensor, x: Tensor) -> Tensor:
        return strength * torch.stack([(before @ newest.t()).abs().sum() for before, newest in older]).sum()

    trained = [p for p in [*found, *alphas] if p.requires_grad and isinstance(p, nn.Parameter)]
    return Bare(vit, head, trained, term if strength else nothing)


def bottleneck(adapter: Any, x: Tensor) -> Tensor:
    """Return the output of an adapter."""
    hidden = F.relu(F.linear(x, adapter.down.weight, adapter.down.bias))
    hidden = F.dropout(hidden, adapter.dropout) if adapter.dropout else hidden
    change: Tensor = F.linear(hidden, adapter.up.weight, adapter.up.bias)
    return adapter.scale * change


def beside(vit: Any, modules: dict[int, Callable[[Tensor], Tensor]]) -> None:
    """Let blocks add a function of the stream to the output of their MLPs."""
    for number, module in modules.items():

        def forward(block: Any, x: Tensor, module: Callable[[Tensor], Tensor] = module, **_: Any) -> Tensor:
            x = x + block.attn(block.norm1(x))
            return x + (block.mlp(block.norm2(x)) + module(x))

        vit.blocks[number].forward = types.MethodType(forward, vit.blocks[number])


def contrast_of(method: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the contrast of `mos` and `hide_prompt` between features and the means of earlier classes."""

    def term(features: Tensor, x: Tensor) -> Tensor:
        rows = torch.cat([method.earlier, features])
        return -method.contrast * (rows @ rows.t() / 0.8).log_softmax(dim=1).diagonal().mean()

    return term


def adapted(method: Any) -> Bare:
    """One adapter per block: `tuna`, and `mos` with its contrast and its pull to the mean of earlier adapters."""
    vit, head = frozen(method)
    own = {int(block): copy.deepcopy(adapter) for block, adapter in method.adapters[-1].items()}
    beside(vit, {block: (lambda x, a=adapter: bottleneck(a, x)) for block, adapter in own.items()})
    trained = [p for adapter in own.values() for p in adapter.parameters()]
    if not hasattr(method, "mean"):
        return Bare(vit, head, trained)
    means = [p.detach().clone() for p in method.mean.parameters()]

    def settle() -> None:
        with torch.no_grad():
            torch._foreach_lerp_(trained, means, method.momentum)

    return Bare(vit, head, trained, contrast_of(method), settle=settle)


def prefixed(method: Any) -> Bare:
    """Keys and values before those of the tokens in some blocks, mixed with those of earlier tasks: `hide_prompt`."""
    vit, head = frozen(method)
    prompts = nn.Parameter(method.prompts[-1].detach().clone())
    older, now = torch.stack([p.detach() for p in list(method.prompts)[:-1]]).mean(dim=0), list[Tensor]()

    def forward(attention: Any, x: Tensor, place: int = 0, **_: Any) -> Tensor:
        b, n, width = x.shape
        heads = attention.num_heads
        q, k, v = attention.qkv(x).reshape(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
        pairs = now[0][place].view(2, 1, -1, heads, width // heads).transpose(2, 3).expand(-1, b, -1, -1, -1)
        y = F.scaled_dot_product_attention(q, torch.cat([k, pairs[0]], dim=2), torch.cat([v, pairs[1]], dim=2))
        out: Tensor = attention.proj(y.transpose(1, 2).reshape(b, n, width))
        return out

    for place, block in enumerate(method.blocks):
        attention = vit.blocks[block].attn
        attention.forward = types.MethodType(lambda own, x, p=place, **_: forward(own, x, p), attention)

    def body(x: Tensor) -> Tensor:
        now[:] = [(1 - method.beta) * prompts + method.beta * older]
        features: Tensor = vit(x)
        return features

    return Bare(body, head, [prompts], contrast_of(method))


def mixed(method: Any) -> Bare:
    """`sema`: an adapter in the lower blocks, a mixture of three in the others, of which the newest is trained."""
    vit, head = frozen(method)
    simple = copy.deepcopy(method.simple)
    modules: dict[int, Callable[[Tensor], Tensor]] = {
        int(block): (lambda x, a=adapter: bottleneck(a, x)) for block, adapter in simple.items()
    }
    trained = list[nn.Parameter]()
    for block in method.blocks:
        adapters = [copy.deepcopy(a) for a in method.mixture(block).adapters]
        rows = [copy.deepcopy(r) for r in method.mixture(block).rows]
        if block == method.blocks[0]:  # blocks expand one after the other, and the newest adapter is trained alone
            adapters.append(copy.deepcopy(adapters[-1]).requires_grad_(True))
            rows.append(copy.deepcopy(rows[-1]).requires_grad_(True))
            trained = [*adapters[-1].parameters(), *rows[-1].parameters()]

        def mixture(x: Tensor, adapters: Any = adapters, rows: Any = rows) -> Tensor:
            mean = x.mean(dim=1)
            weights = torch.cat([row(mean) for row in rows], dim=1).softmax(dim=1)
            each = torch.stack([bottleneck(a, x) for a in adapters], dim=1)
            return torch.einsum("bk,bknw->bnw", weights, each)

        modules[block] = mixture
    beside(vit, modules)
    return Bare(vit, head, trained)


def early(vit: Any, blocks: int, x: Tensor) -> Tensor:
    """Return the features of the first blocks of a transformer."""
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
    for block in vit.blocks[:blocks]:
        tokens = block(tokens)
    features: Tensor = vit.forward_head(vit.norm(tokens))
    return features


def distilled(method: Any) -> Bare:
    """`cl_lora`: LoRA of all tasks below and of the task above; the early exit is distilled from before the task."""
    vit, head = frozen(method)
    newest, teacher, trained = method.of(len(method.tasks) - 1), copy.deepcopy(vit), list[nn.Parameter]()
    weights = nn.Parameter(newest.weights.detach().clone())
    for block, lora in [*method.shared.items(), *newest.loras.items()]:
        path, (down, up) = f"blocks.{block}.attn.qkv", copies([lora.down, lora.up])
        gains = None
        if block in newest.loras:
            place = list(newest.loras).index(block)
            gains = lambda p=place: (weights[::2, p],)  # noqa: E731 (of queries and values)
        vit.get_submodule(path).register_forward_hook(sum_of([down], [up], gains))
        if block in method.shared:
            fixed = [down.detach(), method.teacher[block]]
            teacher.get_submodule(path).register_forward_hook(sum_of(fixed[:1], fixed[1:], None))
        trained += [p for p in (down, up) if p.requires_grad]  # type: ignore[misc]
    lower, earlier = method.specific_blocks[0], torch.stack([t.weights.detach() for t in method.tasks[:-1]])

    def term(features: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = (head(early(teacher, lower, x)) / method.kd_temperature).softmax(dim=1)
        now = (head(early(vit, lower, x)) / method.kd_temperature).log_softmax(dim=1)
        away = F.cosine_similarity(weights.flatten()[None], earlier.flatten(1)).abs().mean()
        return -method.kd * (target * now).sum(dim=1).mean() + method.ortho * away

    return Bare(vit, head, [*trained, weights], term)


def projected(method: Any) -> Bare:
    """`gpm`: G - G M M' for the gradient G of every layer of a small network whose other parameters are frozen."""
    model = copy.deepcopy(method)
    spaces = [(name, layer, space.basis.float(), space.complement) for name, layer, space in model.protected()]

    def project() -> None:
        for name, layer, basis, complement in spaces:
            whole = layer.weight.grad
            gradient = whole[model.old_rows] if name == "head" else whole.flatten(1)  # of the head rows of old classes
            inside = gradient @ basis @ basis.t()
            outside = inside if complement else gradient - inside
            if name == "head":
                whole[model.old_rows] = outside
            else:
                layer.weight.grad = outside.view_as(whole)

    trained = [p for p in model.backbone.parameters() if p.requires_grad]
    return Bare(model.backbone, model.head, trained, project=project)


def scaled(method: Any) -> Bare:
    """`trgp`: W + sum_j W S_j (Q_j - I) S_j' in the layers that trust old tasks, and the projection of `gpm`."""
    bare, position = projected(method), len(method.trust) - 1
    scales, network = list[Any](), bare.body
    names = [name for name, _, _ in method.protected() if name.startswith("backbone.")]
    for name, trust in zip(names, method.trust[position], strict=True):
        own = copies(trust.scales)
        bases = [method.directions[j].of(name) for j in trust.tasks]
        if own:
            parts = [*zip(own, bases, (torch.eye(len(q)) for q in own), strict=True)]
            scales.append((name.removeprefix("backbone."), parts))

    def body(x: Tensor) -> Tensor:
        changed = {}
        for name, parts in scales:
            weight = network.get_submodule(name).weight  # type: ignore[attr-defined]
            flat = weight.flatten(1)
            total = flat
            for scale, basis, identity in parts:
                total = total + (flat @ basis @ (scale - identity)) @ basis.t()
            changed[f"{name}.weight"] = total.view_as(weight)
        features: Tensor = torch.func.functional_call(network, changed, (x,)) if changed else network(x)
        return features

    trained = [*bare.trained, *(q for _, parts in scales for q, _, _ in parts)]
    return Bare(body, bare.head, trained, project=bare.project)

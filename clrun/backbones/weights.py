"""Files of weights as they are found in the world: which tensors of a file belong to a backbone, and under which names.

A file is read by its content, whatever its name. Nothing in it is ever executed: pickles go through torch's restricted
unpickler, in which objects of known harmless kinds (settings, numbers, paths) are replaced by empty stand-ins.

The tensors may lie in a nested mapping ("state_dict", "model", ...) and their names may have a prefix ("module.",
"encoder_q.", ...). Where a file holds several sets, averaged weights come first, as in timm, and the choice is noted.
"""

import hashlib
import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn

from clrun.system import libraries
from clrun.system.checksums import broken_seal
from clrun.system.errors import ConfigError, first_line

State = dict[str, Tensor]

# Keys under which training programs store weights, in the order in which they are tried: averaged weights first.
AVERAGED: tuple[str, ...] = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher", "target_encoder")
RAW: tuple[str, ...] = (
    "state_dict",
    "model",
    "model_state_dict",
    "net",
    "network",
    "module",
    "weights",
    "params",
    "backbone",
)
RAW += ("encoder", "student", "generator", "online_encoder")
# Prefixes that wrappers of a network put before the names of its tensors; of two that fit alike the earlier wins.
PREFIXES: tuple[str, ...] = (
    "teacher.",
    "encoder_q.",
    "backbone.",
    "model.",
    "encoder.",
    "student.",
    "net.",
    "network.",
)
PREFIXES += ("encoder_k.", "visual.", "feature_extractor.", "trunk.", "base_model.", "vit.")
WRAPPERS = ("_orig_mod.", "module.")  # of torch.compile and of data parallelism, anywhere in a name's beginning
DEPTH = 4  # of nested mappings
SAME_FIT = 0.9  # share of the best match from which on a set counts as fitting alike
LISTED = 4  # names in a message
# Classes whose objects stand beside weights in training checkpoints: settings, numbers, paths. Stand-ins replace them.
_PACKAGES = (
    "argparse|pathlib|collections|types|datetime|enum|omegaconf|yacs|easydict|addict|pytorch_lightning|lightning"
)
HARMLESS = re.compile(
    rf"(?:{_PACKAGES}|lightning|lightning_fabric|mmengine|mmcv|fvcore)(?:\.[a-z_0-9]+)*\.[A-Z]\w*"
    r"|numpy\.(?:_?core\.multiarray\.(?:scalar|_reconstruct)|dtype|ndarray|dtypes\.\w+)"
    r"|typing\.\w+|builtins\.(?:list|dict|set|tuple|int|float|str|bool|bytes)|collections\.(?:defaultdict|deque)"
    r"|datetime\.(?:datetime|date|time|timedelta|timezone)"
)


@dataclass(frozen=True)
class Weights:
    """Named tensors found in a file.

    Attributes:
        state: the tensors by name, without wrappers and prefixes.
        path: the file.
        key: where in the file they were, as an option `backbone.weights_key` would say it; "" for the top.
        notes: sentences for the reader of the run: which of several sets was taken, what the file really is.
    """

    state: State
    path: Path
    key: str
    notes: tuple[str, ...] = ()

    def digest(self) -> str:
        """Return the SHA-256 of the file, hexadecimal."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass
class _Set:
    """A mapping of names to tensors somewhere in a file.

    Attributes:
        key: dotted path of mappings to it.
        state: the tensors.
    """

    key: str
    state: State


def check_file(path: Path) -> str:
    """Return what kind of weights a file holds: "safetensors", "torch" or "npz".

    Raises:
        ConfigError: there is no such file, or it is something else; the message says what it is.
    """
    if not path.exists():
        raise ConfigError(f"backbone.weights: there is no file {path}")
    if not path.is_file():
        what = "a folder" if path.is_dir() else "not a regular file"
        raise ConfigError(f"backbone.weights: {path} is {what}; name a file of weights")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise ConfigError(f"backbone.weights: {path} cannot be read ({error.strerror})") from error
    if problem := _no_weights(head):
        raise ConfigError(f"backbone.weights: {path} {problem}")
    if head[:4] == b"PK\x03\x04":
        return _kind_of_zip(path)
    if len(head) > 8 and head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") <= path.stat().st_size - 8:
        return "safetensors"
    if head[:1] == b"\x80" or b"ustar" in head[257:265]:  # pickles of torch before 1.6
        return "torch"
    cut = "; a .safetensors file that is cut off looks like this, too" if path.suffix == ".safetensors" else ""
    raise ConfigError(f"backbone.weights: {path} is neither a safetensors, nor a PyTorch, nor an .npz file{cut}")


def _no_weights(head: bytes) -> str | None:
    """Return what a file is by its first bytes when it is no file of weights, and what to do; None for no finding."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "is empty (0 bytes): the download has probably failed; fetch it again"
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer and not the weights themselves; run 'git lfs pull' where it came from"
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "is a web page (HTML) and not weights: the download has probably failed; fetch it again"
    if text.startswith(b'{"') or text.startswith(b"{\n"):
        return "is a JSON text and not weights; name the file of the weights themselves"
    if head.startswith(b"\x89HDF"):
        return "is a Keras (HDF5) file, which clrun does not read; convert it to safetensors"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf")):
        return "is a compressed archive; unpack it and name the file of weights in it"
    return None


def _kind_of_zip(path: Path) -> str:
    """Return what the zip file at `path` is: PyTorch's own format, or NumPy's .npz.

    Raises:
        ConfigError: it is another archive, or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise ConfigError(f"backbone.weights: {path} is damaged or cut off ({error}); fetch it again") from error
    if any(name.endswith("data.pkl") for name in names):
        if any("/code/" in name for name in names):
            raise ConfigError(f"backbone.weights: {path} is a TorchScript program; save its state_dict() instead")
        return "torch"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    raise ConfigError(
        f"backbone.weights: {path} is a zip archive without weights at its top; unpack it and name a file"
    )


def read_weights(path: Path, *, key: str | None = None, expected: Collection[str] = ()) -> Weights:
    """Return the tensors of a safetensors or PyTorch file that belong to a backbone.

    Args:
        path: the file.
        key: where the tensors are: keys of nested mappings and a prefix of names, with dots ("state_dict_ema",
            "teacher.backbone"); None looks for them.
        expected: names of the backbone's tensors; the set and the prefix that match them best are taken.

    Raises:
        ConfigError: no such file, another kind of file, more than tensors in it, or nothing at `key`.
    """
    kind = check_file(path)
    notes = []
    if kind == "safetensors" and path.suffix.lower() != ".safetensors":
        notes.append(f"{path.name} is a safetensors file by its content, and is read as one")
    content = _content(path, kind)
    if not isinstance(content, Mapping):
        raise ConfigError(f"backbone.weights: {path} holds a {_kind_name(content)} and no tensors by name")
    sets = list(_sets(content))
    if not sets:
        found = ", ".join(map(str, list(content)[:LISTED])) or "nothing"
        raise ConfigError(f"backbone.weights: {path} holds no tensors by name (its keys: {found})")
    if key:
        sets = [_Set(key, _at_key(path, sets, key))]
    chosen, prefix, more = _best(sets, expected)
    state = _without(chosen.state, prefix)
    where = ".".join(part for part in (chosen.key, prefix.rstrip(".")) if part)
    _refuse_nan(path, state)
    return Weights(state, path, where, (*notes, *more))


def _content(path: Path, kind: str) -> Any:
    """Return what a file of weights holds.

    Raises:
        ConfigError: it is damaged, or holds objects of other kinds than tensors and settings.
    """
    if kind == "npz":
        raise ConfigError(f"backbone.weights: {path} holds JAX weights, which only timm's vision transformers can take")
    try:
        if kind == "safetensors":
            damage = broken_seal(path, required=False)
            if damage is not None:
                raise ConfigError(f"backbone.weights: {path} is damaged ({damage}); fetch it again")
            return libraries.load("safetensors.torch").load_file(path)
        return _unpickled(path)
    except ConfigError:
        raise
    except Exception as error:  # safetensors' error has no public base class but Exception
        raise ConfigError(f"backbone.weights: {path} is damaged ({_reason(error)}); fetch it again") from error


class _StandIn:
    """Takes the place of an object that stands beside weights in a file; it ignores all that it is given."""

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        """Ignore the state."""


def _unpickled(path: Path) -> Any:
    """Return the content of a pickle, in which objects of harmless packages are replaced by stand-ins.

    torch's restricted unpickler names one unknown class at a time, hence the loop.

    Raises:
        ConfigError: the file names a class or function of another package.
    """
    allowed: list[tuple[Any, str]] = []
    while True:
        try:
            # An open file: of a path, torch would look at the suffix.
            with torch.serialization.safe_globals(allowed), path.open("rb") as file:  # type: ignore[arg-type]
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            name = _unknown_global(str(error))
            refused = name is None or name in (known for _, known in allowed)
            if refused or not HARMLESS.fullmatch(str(name)):
                what = f"an object of the type {name}" if name else "objects of an unknown kind"
                raise ConfigError(
                    f"backbone.weights: {path} contains more than tensors and is refused ({what}); "
                    "save only the state_dict() of the model, best as safetensors"
                ) from None
            module, _, kind = str(name).rpartition(".")
            allowed.append((type(kind, (_StandIn,), {"__module__": module}), str(name)))


def _unknown_global(message: str) -> str | None:
    """Return the class or function that torch's restricted unpickler has refused; None where it names none."""
    found = re.search(r"GLOBAL ([\w.]+)", message) or re.search(r"<class '([\w.]+)'>", message)
    name = found.group(1) if found else None
    return f"builtins.{name}" if name and "." not in name else name


def _sets(content: Mapping[Any, Any], key: str = "", depth: int = 0) -> Iterator[_Set]:
    """Yield the mappings of names to tensors in a file, outer ones first.

    Numbers and settings beside the tensors do not matter.
    """
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if state:
        yield _Set(key, {_unwrapped(name): value for name, value in state.items()})
    if depth == DEPTH:
        return
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _sets(value, f"{key}.{name}" if key else str(name), depth + 1)


def _unwrapped(name: str) -> str:
    """Return the name of a tensor without what torch.compile and data parallelism put before it."""
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


def _best(sets: list[_Set], expected: Collection[str]) -> tuple[_Set, str, list[str]]:
    """Return the set and the prefix whose names match the expected ones best, and notes on other choices.

    Among equals averaged weights win, then the order of `AVERAGED`, `RAW` and `PREFIXES`.
    """
    names = set(expected)
    candidates = [(found, prefix) for found in sets for prefix in _prefixes(found.state, names)]
    matches = [sum(prefix + name in found.state for name in names) for found, prefix in candidates]
    if names and not max(matches):  # the names want conversion first: go by what the keys and all names begin with
        return _best(sets, ())
    enough = SAME_FIT * max(matches)  # averaged weights may lack buffers
    fits = [(not _averaged(*c), _rank(*c), -m, *c) for c, m in zip(candidates, matches, strict=True) if m >= enough]
    fits.sort(key=lambda entry: entry[:3])
    chosen, prefix = fits[0][3:]
    others = [_called(*entry[3:]) for entry in fits[1:] if names or entry[3] is not chosen]
    if not others:
        return chosen, prefix, []
    why = "averaged weights come first, as in timm" if not fits[0][0] else "the first of its kind"
    return (
        chosen,
        prefix,
        [
            f"backbone.weights: the file holds several sets that fit; '{_called(chosen, prefix)}' was loaded ({why}), "
            f"backbone.weights_key chooses another one: {', '.join(dict.fromkeys(others))}"
        ],
    )


def _averaged(found: _Set, prefix: str) -> bool:
    """Return whether the key or the prefix says that these are averaged weights."""
    return any(part in AVERAGED for part in (*found.key.split("."), *prefix.split(".")))


def _called(found: _Set, prefix: str) -> str:
    """Return the option `backbone.weights_key` that chooses a set and a prefix."""
    return ".".join(part for part in (found.key, prefix.rstrip(".")) if part) or "the top of the file"


def _rank(found: _Set, prefix: str) -> tuple[int, int]:
    """Return where the key and the prefix stand among the known ones; unknown ones come last."""
    known, last = (*AVERAGED, *RAW), found.key.rpartition(".")[2]
    by_key = known.index(last) if last in known else len(known) if last else len(AVERAGED)
    if not prefix:
        return by_key, -1
    return by_key, next((i for i, start in enumerate(PREFIXES) if prefix.startswith(start)), len(PREFIXES))


def _prefixes(state: State, expected: Collection[str]) -> list[str]:
    """Return the prefixes, with their dot, under which expected names stand in `state`; "" always.

    Without expected names the known prefixes that every name shares are candidates.
    """
    found = {""}
    if not expected:
        return [*found, *(p for p in PREFIXES if state and all(name.startswith(p) for name in state))]
    tails = {name.rpartition(".")[2] for name in expected}
    ends = tuple(sorted(expected, key=len, reverse=True)[:64])
    for name in state:
        if name.rpartition(".")[2] not in tails:
            continue
        found.update(name[: -len(end)] for end in ends if name.endswith(f".{end}"))
    return sorted(found)


def _without(state: State, prefix: str) -> State:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {_unwrapped(name[len(prefix) :]): value for name, value in state.items() if name.startswith(prefix)}


def _at_key(path: Path, sets: list[_Set], key: str) -> State:
    """Return the tensors at a key: the path of a set, followed by a prefix of names.

    Raises:
        ConfigError: there are none; the message lists the choices.
    """
    for found in sorted(sets, key=lambda candidate: -len(candidate.key)):
        if key == found.key:
            return found.state
        if not found.key or key.startswith(f"{found.key}."):
            prefix = f"{key[len(found.key) :].strip('.')}."
            if state := _without(found.state, prefix):
                return state
    choices = [found.key for found in sets if found.key]
    heads = sorted({name.partition(".")[0] for found in sets for name in found.state})
    listed = ", ".join(choices or heads[:LISTED])
    raise ConfigError(f"backbone.weights_key: {path} has nothing at {key!r} (there are: {listed})")


def _refuse_nan(path: Path, state: State) -> None:
    """Refuse weights that are not finite."""
    broken = [name for name, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if broken:
        raise ConfigError(
            f"backbone.weights: {path} holds values that are NaN or infinite in {_listed(broken)}; use another file"
        )


def load_weights(
    model: nn.Module,
    name: str,
    path: Path,
    *,
    key: str | None = None,
    convert: Callable[[State, nn.Module], State] | None = None,
    heads: tuple[str, ...] = (),
) -> None:
    """Load a file of weights into `model`, which must find all its tensors there; a classifier may be there, too.

    The model gets an attribute `weights_read` for run.json: {"file", "sha256", "key", "notes"}.

    Args:
        model: the backbone.
        name: what to call it in messages.
        path: the file; safetensors, PyTorch, or JAX's .npz where the model can take it.
        key: where in the file the weights are; None looks for them.
        convert: changes the names or shapes of published files to those of the model.
        heads: names of the model's classifiers, whose tensors may be in the file.

    Raises:
        ConfigError: the file cannot be read or does not fit the model.
    """
    if check_file(path) == "npz":
        _load_npz(model, name, path)
        found = Weights({}, path, "")
    else:
        found = read_weights(path, key=key, expected=list(model.state_dict()))
        _load_state(model, name, found, convert, heads)
    read = {"file": path.name, "sha256": found.digest(), "key": found.key, "notes": list(found.notes)}
    model.weights_read = read  # type: ignore[assignment]


Build = Callable[..., nn.Module]


def takes_weights(build: Build) -> Build:
    """Return a factory of backbones with two more options, `weights` and `weights_key` (see `load_weights`).

    A direct call may leave them out; a configuration lists them, like all options (`conf/backbone/_options/`).

    Args:
        build: called with the shape of the images and its own keyword options.
    """

    @wraps(build)
    def factory(
        shape: tuple[int, ...], *, weights: str | None = None, weights_key: str | None = None, **options: Any
    ) -> nn.Module:
        backbone = build(shape, **options)
        if weights is not None:
            load_weights(backbone, f"backbone {build.__name__}", Path(weights).expanduser(), key=weights_key)
        return backbone

    def preflight(*, weights: str | None, **others: Any) -> None:
        """Refuse a file that holds no weights before anything is built."""
        if weights is not None:
            check_file(Path(weights).expanduser())

    added = [Parameter(name, Parameter.KEYWORD_ONLY, annotation=str | None) for name in ("weights", "weights_key")]
    own = signature(build, eval_str=True)
    factory.__signature__ = own.replace(parameters=[*own.parameters.values(), *added])  # type: ignore[attr-defined]
    factory.__annotations__ = {
        **get_type_hints(build, include_extras=True),
        "weights": str | None,
        "weights_key": str | None,
    }
    factory.preflight = preflight  # type: ignore[attr-defined]
    return factory


def _load_state(
    model: nn.Module,
    name: str,
    found: Weights,
    convert: Callable[[State, nn.Module], State] | None,
    heads: tuple[str, ...],
) -> None:
    """Load named tensors into `model`.

    Raises:
        ConfigError: names or shapes differ.
    """
    state, fits = found.state, f"backbone.weights: {found.path} does not fit {name}"
    try:
        if convert is not None:
            state = convert(state, model)
        result = model.load_state_dict(state, strict=False)
    except (RuntimeError, KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        # Shapes, or names that the conversion expects.
        raise ConfigError(f"{fits} ({' '.join(str(error).split())[:300]})") from error
    unknown = [key for key in result.unexpected_keys if not key.startswith(tuple(f"{head}." for head in heads))]
    if result.missing_keys or unknown:
        prefix = likely_prefix(found.state, model.state_dict())
        raise ConfigError(f"{fits}: {mismatch(result.missing_keys, unknown, prefix)}")


def _load_npz(model: nn.Module, name: str, path: Path) -> None:
    """Load weights of JAX, as Google publishes vision transformers.

    Raises:
        ConfigError: the model cannot take them, or the file has other names or shapes than it expects.
    """
    load: Any = getattr(model, "load_pretrained", None)
    if load is None:
        raise ConfigError(f"backbone.weights: {path} holds JAX weights (.npz), which {name} cannot take")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            broken = [key for key in arrays.files if not np.isfinite(arrays[key]).all()]
        if not broken:
            load(str(path))
    except (KeyError, ValueError, AssertionError, RuntimeError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(f"backbone.weights: {path} does not fit {name} ({_reason(error)})") from error
    if broken:
        raise ConfigError(f"backbone.weights: {path} holds values that are NaN or infinite in {_listed(broken)}")
    same = [key for key, value in model.state_dict().items() if value.numel() > 1 and torch.equal(value, before[key])]
    if len(same) > len(before) // 2:
        raise ConfigError(f"backbone.weights: {path} does not fit {name} (it has no values for {_listed(same)})")


def mismatch(missing: Collection[str], unknown: Collection[str], prefix: str | None) -> str:
    """Return how the names of a file differ from those of a model: both lists, and the prefix that may explain it."""
    parts = []
    if missing:
        parts.append(f"the file has no values for {_listed(missing)}")
    if unknown:
        parts.append(f"the model has no tensors called {_listed(unknown)}")
    if prefix:
        parts.append(f"the names in the file may begin with '{prefix}': try backbone.weights_key={prefix.rstrip('.')}")
    return "; ".join(parts)


def likely_prefix(names: Collection[str], expected: Collection[str]) -> str | None:
    """Return what all names of a file begin with, up to a dot, when no expected name does; None for nothing."""
    heads = {name.partition(".")[0] for name in names}
    if len(heads) != 1:
        return None
    head = f"{heads.pop()}."
    return None if any(name.startswith(head) for name in expected) or head in {f"{n}." for n in names} else head


def _listed(names: Collection[str]) -> str:
    """Return the first of some names, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(sorted(names)[:LISTED]) + more


def _kind_name(value: Any) -> str:
    """Return the name of the type of a value."""
    return type(value).__name__


def _reason(error: BaseException) -> str:
    """Return the first line of an error's message, without control characters."""
    return re.sub(r"\x1b\[[0-9;]*m|[\x00-\x1f]", "", first_line(error))[:200]

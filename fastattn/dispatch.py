"""Which backend takes a call, and why the others do not."""

import contextlib
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

from .backends import ABSENT, BACKENDS, OPS

# A plain global, read on every call and guarded on by torch.compile. One name for all threads: a thread pool started
# inside `use_backend` (autograd's, a data loader's) has to see the choice too.
_forced: str | None = None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Makes every op inside the `with` block run on one backend, in all threads.

    `use_backend("eager")` runs the definition in plain torch. With any other name, a call that this backend cannot take
    raises a RuntimeError that says why, instead of going elsewhere.

    Raises:
        ValueError: there is no backend of this name.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"there is no backend {name!r}; choose one of {', '.join(map(repr, BACKENDS))}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def _reason(backend: str, op: str, args: tuple) -> str | None:
    """Why this backend cannot take this call; None if it can."""
    if backend == "eager":
        return None
    # As tensor parallelism makes them; torch knows no sharding of our ops, but of those that eager is written in.
    # Looked up by attribute, because torch.distributed.tensor is slow to import.
    if type(args[0]) is not torch.Tensor and hasattr(args[0], "device_mesh"):
        return "its tensors are DTensors, and a kernel knows plain ones only; pass each one's to_local()"
    module = BACKENDS[backend].get(op)
    if module is None:
        return ABSENT.get(backend, f"the {backend} backend has no {op}")
    if forward_ad._current_level >= 0:  # a kernel would drop the tangents without a word
        return (
            "it has no forward-mode differentiation, which is on here; leave forward_ad.dual_level, or torch.func.jvp"
        )
    return module.unsupported(*args)


def reasons(op: str, args: tuple) -> dict[str, str | None]:
    """For each backend why it cannot take this call, None if it can. `args` are the op's normalised arguments."""
    return {backend: _reason(backend, op, args) for backend in BACKENDS}


def choose(op: str, args: tuple) -> str:
    """The name of the backend that runs this call. `args` are the op's normalised arguments."""
    if _explaining and threading.get_ident() in _explaining:
        _answer(op, args)
    if _forced is not None:
        reason = _reason(_forced, op, args)
        if reason is not None:
            raise RuntimeError(f"{op} cannot run on the {_forced} backend, which use_backend asks for: {reason}")
        return _forced
    for backend in BACKENDS:
        if _reason(backend, op, args) is None:
            break
    if backend == "eager" and args[0].is_cuda and not torch.compiler.is_compiling():
        _warn_eager_on_gpu(op)
    return backend


_warned: set[str] = set()


def _warn_eager_on_gpu(op: str) -> None:
    if op not in _warned:
        _warned.add(op)
        warnings.warn(
            f"fastattn.{op} runs in plain torch on this GPU; fastattn.explain({op!r}, ...) says why", stacklevel=4
        )


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: the backend that would run the call and each backend's reason for not taking it.

    Attributes:
        op: the op's name.
        backend: the backend that would run.
        reasons: for each backend, None if it can take the call, else one sentence.
    """

    op: str
    backend: str
    reasons: dict[str, str | None]

    def __str__(self) -> str:
        lines = [f"{self.op} runs on: {self.backend}"]
        for name, reason in self.reasons.items():
            lines.append(f"  {name:<6} {'can take it' if reason is None else reason}")
        return "\n".join(lines)


class _Explained(Exception):  # noqa: N818  (control flow, not an error)
    """Carries the answer out of an op's public function before anything runs."""

    def __init__(self, explanation: Explanation) -> None:
        self.explanation = explanation


_explaining: set[int] = set()  # the threads inside `explain`; other threads' calls go on


def _answer(op: str, args: tuple) -> None:
    """What `choose` does while `explain` is asking: raises _Explained."""
    found = reasons(op, args)
    if _forced is not None:
        backend = _forced
        found = {
            name: reason or (None if name == _forced else f"use_backend({_forced!r}) is in force")
            for name, reason in found.items()
        }
    else:
        backend = next(name for name, reason in found.items() if reason is None)
    raise _Explained(Explanation(op, backend, found))


def explain(op: str, *args, **kwargs) -> Explanation:
    """Which backend would run `fastattn.<op>(*args, **kwargs)`, and each other backend's reason for not taking it.

    Nothing is computed. The arguments are checked as in a real call, and the same errors are raised.

        >>> print(fastattn.explain("attention", query, key, value))
        attention runs on: cpu
          cpu    can take it
          eager  can take it

    Raises:
        ValueError: there is no op of this name, or the call's own errors.
    """
    from . import ops

    if op not in OPS:
        raise ValueError(f"there is no op {op!r}; choose one of {', '.join(OPS)}")
    _explaining.add(threading.get_ident())
    try:
        with torch.random.fork_rng(devices=[]):  # a dropout seed drawn here must not change the caller's next numbers
            getattr(ops, op)(*args, **kwargs)
    except _Explained as answer:
        return answer.explanation
    finally:
        _explaining.discard(threading.get_ident())
    raise RuntimeError(f"fastattn.{op} returned without asking for a backend; please report this")

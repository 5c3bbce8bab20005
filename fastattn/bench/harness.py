"""Compares several implementations of one computation: they must agree, then they are timed in turn.

A `Case` says what is computed; its `Problem` holds one `Peer` for each implementation. `compare` checks every peer's
outputs and gradients against float64 and then times all of them interleaved (`timing.py`), and with them a matrix
product and a copy (`machine.Yardsticks`): a machine that slows down for a moment slows all of them. A peer's figure is
its median over the rounds; a ratio, also that to the floor, is the median of the rounds' own ratios.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor

from .. import dispatch, verify
from . import peers
from .machine import Yardsticks, peak_memory
from .timing import interleave

FORWARD = "forward"  # under torch.no_grad
TRAINING = "training"  # forward and backward; every floating input and every parameter gets its gradient
STEP = "training step"  # the call is a whole step, its optimizer's included
OURS = "fastattn"
EAGER = "eager"
BACKEND = "backend"  # the kernel alone, where a case measures what a call costs beside it

# fastattn's results must keep the rule of docs/numerics.md (`fastattn.verify`). Of the other peers it is only asked
# whether they compute the same thing, since a figure beside another computation would mean nothing: they may err this
# much further.
PEER_FACTOR = 8.0


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Peer:
    """One implementation.

    Attributes:
        call: `call(*inputs)` gives a tensor or a tuple of them.
        inputs: tensors and others. In training the floating tensors get gradients.
        parameters: leaves that `call` closes over (a module's parameters) and that get gradients too, after the inputs.
        common: turns an output, or the gradient of one of `inputs`, into the form in which peers are compared: a peer
            on padded batches drops the padding. Not timed.
        received: turns the gradient of an output into what a loss would send: zero at the padding.
        threads: how many of torch's threads it runs with; None for as many as there are.
        inference: whether a forward runs in inference_mode instead of no_grad. Not for `call` to do: torch.compile fails on it.
    """

    call: Callable
    inputs: tuple
    parameters: tuple[Tensor, ...] = ()
    common: Callable[[Tensor], Tensor] = _same
    received: Callable[[Tensor], Tensor] = _same
    threads: int | None = None
    inference: bool = False


@dataclass(frozen=True)
class Problem:
    """The peers of one case by name, "fastattn" among them, and the definition, to run in float64. torch.compile is one more,
    of "eager", where that is there."""

    peers: dict[str, Peer]
    baseline: str
    definition: Peer


@dataclass(frozen=True)
class Case:
    """One computation at one size.

    Attributes:
        op: the op's name, as in `fastattn.<op>`.
        shape: the sizes that matter, by name.
        dtype: of all floating inputs.
        direction: FORWARD, TRAINING or STEP.
        build: makes the problem: inputs from a fixed seed, and the peers.
        flops: floating-point operations that the computation needs; 0 where they are not the matter.
        moved: bytes that it must read and write, likewise.
        options: what else distinguishes the case, in words.
        device: "cpu" or "cuda".
        compiled: whether torch.compile of the eager peer is worth its time.
    """

    op: str
    shape: dict[str, int]
    dtype: torch.dtype
    direction: str
    build: Callable[["Case"], Problem]
    flops: float
    moved: float
    options: str = ""
    device: str = "cpu"
    compiled: bool = True

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def size(self) -> str:
        """The shape and the options in words."""
        return " ".join([*(f"{name}={size}" for name, size in self.shape.items()), self.options]).strip()

    def __str__(self) -> str:
        return f"{self.size} {self.dtype_name} {self.direction}"


@dataclass(frozen=True)
class Ratio:
    """The median of the rounds' ratios, and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, above: Sequence[float], below: Sequence[float]) -> "Ratio":
        """Of samples of the same rounds: how many times as long the first takes as the second."""
        low, median, high = statistics.quantiles([a / b for a, b in zip(above, below, strict=True)], n=4)
        return cls(median, low, high)


@dataclass(frozen=True)
class Timing:
    """What one peer took.

    Attributes:
        samples: seconds a call, one a round.
        error: its largest error, as a share of the largest value.
        memory: bytes that a call takes beside its inputs; None where that is not known.
    """

    samples: list[float]
    error: float
    memory: int | None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


@dataclass(frozen=True)
class Result:
    """A case and what came of it.

    Attributes:
        timings: by peer.
        floors: for each yardstick the seconds, one sample a round, that this machine then took for as much of it as the
            case needs.
        notes: what ran otherwise than the names say, and why: an op without a kernel, a peer that is missing.
    """

    case: Case
    baseline: str
    timings: dict[str, Timing]
    floors: dict[str, list[float]]
    notes: list[str]

    def speed(self, peer: str, other: str) -> Ratio:
        """How many times as fast as another peer."""
        return Ratio.of(self.timings[other].samples, self.timings[peer].samples)

    @property
    def bound(self) -> str | None:
        """The yardstick that sets the floor; None where the case's work is not counted."""
        return max(self.floors, key=lambda name: statistics.median(self.floors[name]), default=None)

    def share_of_floor(self, peer: str) -> float | None:
        """The shortest time in which this machine could do it, as a share of what the peer took."""
        if self.bound is None:
            return None
        return Ratio.of(self.floors[self.bound], self.timings[peer].samples).median

    @property
    def overhead(self) -> float | None:
        """Seconds that a call takes beside its kernel; None where the case does not measure it."""
        if BACKEND not in self.timings:
            return None
        pairs = zip(self.timings[OURS].samples, self.timings[BACKEND].samples, strict=True)
        return statistics.median(call - kernel for call, kernel in pairs)

    def as_dict(self) -> dict:
        """For JSON: plain names and numbers, seconds and bytes throughout."""
        return {
            "op": self.case.op,
            "shape": self.case.shape,
            "options": self.case.options,
            "dtype": self.case.dtype_name,
            "direction": self.case.direction,
            "flops": self.case.flops,
            "bytes": self.case.moved,
            "floors_s": {name: statistics.median(samples) for name, samples in self.floors.items()},
            "overhead_s": self.overhead,
            "baseline": self.baseline,
            "notes": self.notes,
            "peers": {name: self.peer_as_dict(name) for name in self.timings},
        }

    def peer_as_dict(self, name: str) -> dict:
        """One peer's figures, for JSON."""
        timing = self.timings[name]
        to_baseline, ours = self.speed(name, self.baseline), self.speed(OURS, name)
        return {
            "median_s": timing.median,
            "min_s": min(timing.samples),
            "max_s": max(timing.samples),
            "rounds": len(timing.samples),
            "ratio": to_baseline.median,
            "ratio_quartiles": [to_baseline.low, to_baseline.high],
            "fastattn_ratio": ours.median,
            "fastattn_ratio_quartiles": [ours.low, ours.high],
            "gflops": self.case.flops / timing.median / 1e9,
            "gbytes_per_s": self.case.moved / timing.median / 1e9,
            "share_of_floor": self.share_of_floor(name),
            "memory_bytes": timing.memory,
            "error": timing.error,
        }


def peer_names(case: Case, compile: bool) -> list[str]:
    """The peers that `compare` times for this case."""
    return list(_problem(case, compile).peers)


def compare(
    case: Case, yardsticks: Yardsticks, *, seconds: float = 2.0, min_rounds: int = 5, compile: bool = True
) -> Result:
    """Checks and times every peer of a case, spending about `seconds` on the timing.

    With `compile`, torch.compile of the eager peer is one more peer. A peer other than fastattn and the baseline that
    fails is left out, and a note says why.

    Raises:
        AssertionError: fastattn's outputs or gradients are not those of the definition.
    """
    problem = _problem(case, compile)
    steps, errors, notes = {}, {}, []
    expected = _expected(case, problem)
    for name, peer in problem.peers.items():
        try:
            step = _step(peer, case.direction)
            errors[name] = _check(case, name, peer, step, expected)
            steps[name] = step
        except Exception as error:  # noqa: PERF203  (the other peers' figures stand)
            if name in (OURS, problem.baseline):
                raise
            notes.append(f"{name} is left out: {first_line(error)}")
    del expected
    notes += _plain_torch(steps[OURS])
    memory = {name: peak_memory(step, case.device) for name, step in steps.items()}
    beside = yardsticks.of(case.dtype, case.flops, case.moved)
    calls = [*steps.values(), *(yardstick.call for yardstick in beside.values())]
    rounds = interleave(calls, seconds=seconds, min_rounds=min_rounds, device=case.device)
    samples = dict(zip([*steps, *beside], rounds, strict=True))
    timings = {name: Timing(samples[name], errors[name], memory[name]) for name in steps}
    floors = {name: [s * yardstick.share for s in samples[name]] for name, yardstick in beside.items()}
    return Result(case, problem.baseline, timings, floors, notes)


def first_line(error: Exception) -> str:
    """What an exception says, for a table."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _problem(case: Case, compile: bool) -> Problem:
    """The case's problem, made on its device; with torch.compile as one more peer."""
    with torch.device(case.device):
        problem = case.build(case)
    eager = problem.peers.get(EAGER)
    if not (compile and case.compiled) or eager is None:
        return problem
    return replace(problem, peers={**problem.peers, peers.COMPILE: replace(eager, call=peers.compiled(eager.call))})


def _step(peer: Peer, direction: str) -> Callable[[], tuple[Tensor, ...]]:
    """The timed call: it gives the outputs and, in training, the gradients of the inputs and parameters after them."""
    if peer.threads is not None:
        return _with_threads(peer.threads, _step(replace(peer, threads=None), direction))
    if direction == FORWARD:

        def forward():
            with torch.inference_mode() if peer.inference else torch.no_grad():
                return _tuple(peer.call(*peer.inputs))

        return forward
    if direction == STEP:
        return lambda: _tuple(peer.call(*peer.inputs))

    inputs = tuple(x.detach().requires_grad_() if _floating(x) else x for x in peer.inputs)
    leaves = [*(x for x in inputs if _floating(x)), *peer.parameters]
    grads = [peer.received(_pattern(out)) for out in _tuple(peer.call(*inputs))]

    def training():
        outputs = _tuple(peer.call(*inputs))
        return (*outputs, *torch.autograd.grad(outputs, leaves, grads))

    return training


def _with_threads(count: int, step: Callable) -> Callable:
    def limited():
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            return step()
        finally:
            torch.set_num_threads(before)

    return limited


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _floating(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _pattern(out: Tensor) -> Tensor:
    """A gradient for an output: it differs along the features only, so that padded and packed batches get the same one,
    and its values (eighths) are exact in every dtype. A loss gets 1."""
    if out.ndim == 0:
        return torch.ones_like(out)
    wave = (torch.arange(out.shape[-1], device=out.device) * 7 % 17 - 8) / 8
    return wave.to(out.dtype).expand(out.shape).contiguous()


def _expected(case: Case, problem: Problem) -> tuple[list[Tensor], list[Tensor]]:
    """What the definition gives in the case's dtype and in float64."""
    definition = problem.definition

    def at(dtype: torch.dtype) -> list[Tensor]:
        inputs = tuple(x.to(dtype) if _floating(x) else x for x in definition.inputs)
        return _common(definition, _step(replace(definition, inputs=inputs), case.direction)(), case.direction)

    return at(case.dtype), at(torch.float64)


def _check(case: Case, name: str, peer: Peer, step: Callable, expected: tuple[list[Tensor], list[Tensor]]) -> float:
    """The largest error of a peer, as a share of the reference's largest value."""
    largest_error = 0.0
    found = _common(peer, step(), case.direction)
    for index, tensors in enumerate(zip(found, *expected, strict=True)):
        comparison = verify.compare(*tensors, name=f"result {index} of {name}")
        factor = 1.0 if name == OURS else PEER_FACTOR
        if comparison.mismatch is not None or comparison.error > factor * comparison.allowed:
            raise AssertionError(f"no figure is reported for a wrong result: {case.op} {case}: {comparison}")
        largest = tensors[2].abs().max().item() if tensors[2].numel() else 0.0
        largest_error = max(largest_error, comparison.error / largest if largest else 0.0)
    return largest_error


def _plain_torch(step: Callable[[], object]) -> list[str]:
    """The ops that a call runs in plain torch, each with the reasons why no kernel takes it, in words."""
    choose, found = dispatch.choose, {}

    def noting(op: str, args: tuple) -> str:
        backend = choose(op, args)
        if backend == "eager":
            found[op] = "; ".join(f"{b}: {reason}" for b, reason in dispatch.reasons(op, args).items() if reason)
        return backend

    with mock.patch.object(dispatch, "choose", noting):
        step()
    return [f"fastattn runs {op} in plain torch here: {why}" for op, why in found.items()]


def _common(peer: Peer, results: tuple[Tensor, ...], direction: str) -> list[Tensor]:
    """All results but the parameters' gradients, which come last, in the form that is compared."""
    count = len(results) - (len(peer.parameters) if direction == TRAINING else 0)
    return [(peer.common(x) if i < count else x).detach() for i, x in enumerate(results)]

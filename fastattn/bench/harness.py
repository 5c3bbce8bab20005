"""Compares several implementations of one computation: they must agree, then they are timed in turn.

A `Case` says what is computed; its `Problem` holds one `Peer` for each implementation. `compare` checks every peer's
outputs and gradients against float64 and then times all of them interleaved (`timing.py`): a machine that slows down
for a moment slows all of them. A peer's figure is its median over the rounds; a ratio is the median of the rounds' own
ratios.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import verify
from . import peers
from .machine import Floors
from .timing import interleave

FORWARD = "forward"  # under torch.no_grad
TRAINING = "training"  # forward and backward; every floating input and every parameter gets its gradient
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
    """

    call: Callable
    inputs: tuple
    parameters: tuple[Tensor, ...] = ()
    common: Callable[[Tensor], Tensor] = _same
    received: Callable[[Tensor], Tensor] = _same


@dataclass(frozen=True)
class Problem:
    """The peers of one case by name ("fastattn" and "eager" among them), and the definition, to run in float64."""

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
        direction: FORWARD or TRAINING.
        build: makes the problem: inputs from a fixed seed, and the peers.
        flops: floating-point operations that the computation needs.
        moved: bytes that it must read and write.
        options: what else distinguishes the case, in words.
    """

    op: str
    shape: dict[str, int]
    dtype: torch.dtype
    direction: str
    build: Callable[["Case"], Problem]
    flops: float
    moved: float
    options: str = ""

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
class Timing:
    """What one peer took (seconds a call, one sample a round), and its error as a share of the largest value."""

    samples: list[float]
    ratios: list[float]
    error: float

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def ratio(self) -> float:
        """How many times as fast as the baseline."""
        return statistics.median(self.ratios)

    @property
    def ratio_range(self) -> tuple[float, float]:
        """The quartiles of the rounds' ratios."""
        low, _, high = statistics.quantiles(self.ratios, n=4)
        return low, high


@dataclass(frozen=True)
class Result:
    """A case, what each peer took, and the shortest times in which this machine could multiply and move as much."""

    case: Case
    baseline: str
    timings: dict[str, Timing]
    matmul_floor: float
    copy_floor: float

    @property
    def floor(self) -> float:
        """The shortest time in which this machine could do it (see `Floors`)."""
        return max(self.matmul_floor, self.copy_floor)

    @property
    def compute_bound(self) -> bool:
        """Whether multiplying sets the floor, not moving."""
        return self.matmul_floor >= self.copy_floor

    @property
    def overhead(self) -> float | None:
        """Seconds that a call takes beside its kernel; None where the case does not measure it."""
        if BACKEND not in self.timings:
            return None
        pairs = zip(self.timings[OURS].samples, self.timings[BACKEND].samples, strict=True)
        return statistics.median(call - kernel for call, kernel in pairs)

    def as_dict(self) -> dict:
        """For JSON: plain names and numbers, seconds throughout."""
        return {
            "op": self.case.op,
            "shape": self.case.shape,
            "options": self.case.options,
            "dtype": self.case.dtype_name,
            "direction": self.case.direction,
            "flops": self.case.flops,
            "bytes": self.case.moved,
            "matmul_floor_s": self.matmul_floor,
            "copy_floor_s": self.copy_floor,
            "overhead_s": self.overhead,
            "baseline": self.baseline,
            "peers": {name: self.peer_as_dict(name) for name in self.timings},
        }

    def peer_as_dict(self, name: str) -> dict:
        """One peer's figures, for JSON."""
        timing = self.timings[name]
        return {
            "median_s": timing.median,
            "min_s": min(timing.samples),
            "max_s": max(timing.samples),
            "rounds": len(timing.samples),
            "ratio": timing.ratio,
            "ratio_quartiles": list(timing.ratio_range),
            "gflops": self.case.flops / timing.median / 1e9,
            "gbytes_per_s": self.case.moved / timing.median / 1e9,
            "share_of_floor": self.floor / timing.median,
            "error": timing.error,
        }


def peer_names(case: Case, compile: bool) -> list[str]:
    """The peers that `compare` times for this case."""
    return list(_with_compile(case.build(case), compile).peers)


def compare(case: Case, floors: Floors, *, seconds: float = 2.0, min_rounds: int = 5, compile: bool = True) -> Result:
    """Checks and times every peer of a case, spending about `seconds` on the timing.

    With `compile`, torch.compile of the eager peer is one more peer.

    Raises:
        AssertionError: a peer's outputs or gradients are not those of the definition.
    """
    problem = _with_compile(case.build(case), compile)
    steps = {name: _step(peer, case.direction) for name, peer in problem.peers.items()}
    errors = _check(case, problem, steps)
    taken = interleave(list(steps.values()), seconds=seconds, min_rounds=min_rounds)
    samples = dict(zip(steps, taken, strict=True))
    timings = {
        name: Timing(own, [b / t for b, t in zip(samples[problem.baseline], own, strict=True)], errors[name])
        for name, own in samples.items()
    }
    return Result(case, problem.baseline, timings, *floors.seconds(case.dtype, case.flops, case.moved))


def _with_compile(problem: Problem, compile: bool) -> Problem:
    if not compile:
        return problem
    eager = problem.peers[EAGER]
    return replace(problem, peers={**problem.peers, peers.COMPILE: replace(eager, call=peers.compiled(eager.call))})


def _step(peer: Peer, direction: str) -> Callable[[], tuple[Tensor, ...]]:
    """The timed call: it gives the outputs and, in training, the gradients of the inputs and parameters after them."""
    if direction == FORWARD:

        def forward():
            with torch.no_grad():
                return _tuple(peer.call(*peer.inputs))

        return forward

    inputs = tuple(x.detach().requires_grad_() if _floating(x) else x for x in peer.inputs)
    leaves = [*(x for x in inputs if _floating(x)), *peer.parameters]
    grads = [peer.received(_pattern(out)) for out in _tuple(peer.call(*inputs))]

    def training():
        outputs = _tuple(peer.call(*inputs))
        return (*outputs, *torch.autograd.grad(outputs, leaves, grads))

    return training


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


def _check(case: Case, problem: Problem, steps: dict[str, Callable]) -> dict[str, float]:
    """The largest error of each peer, as a share of the reference's largest value."""
    definition = problem.definition

    def at(dtype: torch.dtype) -> list[Tensor]:
        inputs = tuple(x.to(dtype) if _floating(x) else x for x in definition.inputs)
        return _common(definition, _step(replace(definition, inputs=inputs), case.direction)(), case.direction)

    reference, plain = at(torch.float64), at(case.dtype)
    errors = {}
    for name, peer in problem.peers.items():
        errors[name] = 0.0
        found = _common(peer, steps[name](), case.direction)
        for index, tensors in enumerate(zip(found, plain, reference, strict=True)):
            comparison = verify.compare(*tensors, name=f"result {index} of {name}")
            factor = 1.0 if name == OURS else PEER_FACTOR
            if comparison.mismatch is not None or comparison.error > factor * comparison.allowed:
                raise AssertionError(f"no figure is reported for a wrong result: {case.op} {case}: {comparison}")
            largest = tensors[2].abs().max().item() if tensors[2].numel() else 0.0
            errors[name] = max(errors[name], comparison.error / largest if largest else 0.0)
    return errors


def _common(peer: Peer, results: tuple[Tensor, ...], direction: str) -> list[Tensor]:
    """All results but the parameters' gradients, which come last, in the form that is compared."""
    count = len(results) - (len(peer.parameters) if direction == TRAINING else 0)
    return [(peer.common(x) if i < count else x).detach() for i, x in enumerate(results)]

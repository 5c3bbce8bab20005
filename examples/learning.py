"""The same model trained twice from the same seed, in plain torch and with fastattn, and what came of it.

What the training examples share. An example says how a run is made; `compare` trains one run a backend, in turns, and
measures; `chart` draws the learning curves on top of each other and `report` prints the numbers.

    def make_run(backend):                      # called once for each name in BACKENDS, from the same seed
        model = ...
        if backend == "fastattn":
            fastattn.accelerate(model)
        return Run(step=..., evaluate=...)

    comparison = compare(make_run, steps=100, evaluate_every=25)
    chart(out / "name.png", "A title", comparison.losses(), comparison.metric("accuracy", {"majority class": 0.2}))
    report(comparison, "accuracy", {"majority class": 0.2})

For curves on top of each other a run must do the same arithmetic in both backends, so without dropout: fastattn draws its
masks inside its kernels, and so other ones than torch.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import fastattn
from fastattn.bench.machine import describe, peak_memory
from fastattn.bench.report import COLOURS, name_of

BACKENDS = ("eager", "fastattn")  # plain torch, the baseline, comes first


@dataclass(frozen=True)
class Run:
    """A model in training.

    Attributes:
        step: does the training step of that number, counted from 0, and returns its loss, a number or a scalar tensor. What it
            draws from torch's generator is the same in every run, wherever else the generator is used in between.
        evaluate: the metric on held-out data.
        model: for what comes after training, such as examples of what the model says.
    """

    step: Callable[[int], torch.Tensor | float]
    evaluate: Callable[[], float] | None = None
    model: torch.nn.Module | None = None


@dataclass
class Training:
    """What came of a run.

    Attributes:
        run: what `make_run` gave.
        losses: of each step.
        seconds: of each step that was timed.
        metric: what `evaluate` said, by the number of steps done.
        memory: bytes by which the process grew at most during a step; None where Linux does not tell.
    """

    run: Run
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    metric: dict[int, float] = field(default_factory=dict)
    memory: int | None = None

    @property
    def seconds_per_step(self) -> float:
        """The median."""
        return median(self.seconds)

    @property
    def final(self) -> float:
        """The metric after the last step."""
        return self.metric[max(self.metric)]


@dataclass(frozen=True)
class Panel:
    """One of a chart's axes.

    Attributes:
        label: of the vertical axis; the horizontal one counts steps.
        curves: by name, pairs of a step and a value. The second is dashed, so that the first can be seen below it.
        levels: by name, values to draw as horizontal lines, such as a baseline's.
    """

    label: str
    curves: Mapping[str, Sequence[tuple[int, float]]]
    levels: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """The trainings by backend, the baseline first."""

    trainings: dict[str, Training]

    def __getitem__(self, backend: str) -> Training:
        return self.trainings[backend]

    @property
    def baseline(self) -> Training:
        return next(iter(self.trainings.values()))

    def speed(self, backend: str = "fastattn") -> float:
        """How many times as fast as the baseline: the ratio of the median times of a step."""
        return self.baseline.seconds_per_step / self[backend].seconds_per_step

    def largest_difference(self, backend: str = "fastattn") -> float:
        """Of the losses from the baseline's, at any step."""
        return max(abs(a - b) for a, b in zip(self.baseline.losses, self[backend].losses, strict=True))

    def losses(self) -> Panel:
        return Panel("loss", {name: list(enumerate(t.losses, 1)) for name, t in self.trainings.items()})

    def metric(self, label: str, levels: Mapping[str, float] | None = None) -> Panel:
        """The metric over the steps, with the metric of other methods as lines."""
        return Panel(label, {name: sorted(t.metric.items()) for name, t in self.trainings.items()}, levels or {})


def on(backend: str) -> AbstractContextManager[None]:
    """Inside `with on(backend):` models of fastattn's own run in plain torch for "eager", with kernels for "fastattn".

    Plain torch is fastattn's definition of each op, written out: attention's scores and the logits of a vocabulary exist as a
    whole.
    """
    return fastattn.use_backend("eager") if backend == "eager" else nullcontext()


def compare(
    make_run: Callable[[str], Run],
    steps: int,
    *,
    backends: Sequence[str] = BACKENDS,
    stretch: int = 8,
    evaluate_every: int | None = None,
    seed: int = 0,
) -> Comparison:
    """Trains one run a backend for `steps` steps, each made from the same seed, in turns of `stretch` steps.

    The runs take turns so that a slow phase of the machine meets them alike; who goes first rotates. The first step of a
    turn measures memory and is not timed: caches and allocator are still the other run's. The metric is taken before
    the first step, after the last one, and after every turn that reaches a multiple of `evaluate_every`.
    """
    if steps < 2 or stretch < 2:
        raise ValueError(f"steps and stretch must be 2 or more, so that a step is timed; got {steps} and {stretch}")
    trainings, states = {}, {}
    for backend in backends:
        torch.manual_seed(seed)
        trainings[backend] = Training(make_run(backend))
        torch.manual_seed(seed)
        states[backend] = torch.get_rng_state()
    with tqdm(total=steps * len(backends), desc="training", unit="step") as bar:
        for turn, numbers in enumerate(_turns(steps, stretch)):
            for backend in _rotated(backends, turn):
                training = trainings[backend]
                if turn == 0:
                    _evaluate(training, 0)
                torch.set_rng_state(states[backend])
                for number in numbers:
                    _step(training, number, measure_memory=number == numbers[0])
                    bar.update()
                states[backend] = torch.get_rng_state()
                if numbers[-1] + 1 == steps or _passes(numbers, evaluate_every):
                    _evaluate(training, numbers[-1] + 1)
                last = f"{training.final:.3f}" if training.metric else ""
                bar.set_postfix_str(f"{backend}: loss {training.losses[-1]:.3f} metric {last}".removesuffix(" metric "))
    return Comparison(trainings)


def _turns(steps: int, stretch: int) -> Iterator[range]:
    for first in range(0, steps, stretch):
        yield range(first, min(first + stretch, steps))


def _rotated(names: Sequence[str], turn: int) -> list[str]:
    first = turn % len(names)
    return [*names[first:], *names[:first]]


def _passes(numbers: range, every: int | None) -> bool:
    return every is not None and (numbers[-1] + 1) // every > numbers[0] // every


def _step(training: Training, number: int, measure_memory: bool) -> None:
    losses = []

    def step() -> None:
        losses.append(float(training.run.step(number)))  # waits for a GPU, too

    if measure_memory:
        memory = peak_memory(step)
        if memory is not None and number > 0:  # the first step makes the optimizer's state
            training.memory = max(memory, training.memory or 0)
    else:
        start = time.perf_counter()
        step()
        training.seconds.append(time.perf_counter() - start)
    training.losses.append(losses[0])


def _evaluate(training: Training, steps: int) -> None:
    if training.run.evaluate is not None:
        training.metric[steps] = float(training.run.evaluate())


def chart(path: Path, title: str, *panels: Panel) -> Path:
    """Draws the panels side by side, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), layout="constrained", squeeze=False)
    for axes, panel in zip(rows[0], panels, strict=True):
        for index, (name, points) in enumerate(panel.curves.items()):
            style = {"linestyle": "--", "linewidth": 1.3} if index else {"linewidth": 3, "alpha": 0.8}
            axes.plot(*zip(*points, strict=True), label=name, color=COLOURS.get(name), **style)
        for index, (name, value) in enumerate(panel.levels.items()):
            axes.axhline(value, label=name, color="black", linewidth=0.8, linestyle=(":", "-.", "--")[index % 3])
        axes.set(xlabel="step", ylabel=panel.label)
        axes.legend(fontsize=8)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, format="png")
    pyplot.close(figure)
    return path


def report(comparison: Comparison, metric: str, levels: Mapping[str, float] | None = None, form: str = ".1%") -> None:
    """Prints what each run reached and took, under what other methods reach (`levels`), and the machine.

    `form` is how the metric is written, as for `format`.
    """
    table = Table(title=f"On {name_of(describe())}", title_justify="left")
    table.add_column("run")
    for heading in (metric, "last loss", "a step", "times as fast", "memory of a step"):
        table.add_column(heading, justify="right")
    for name, value in (levels or {}).items():
        table.add_row(name, format(value, form), *[""] * 4)
    for name, training in comparison.trainings.items():
        table.add_row(
            name,
            format(training.final, form) if training.metric else "",
            f"{training.losses[-1]:.4f}",
            f"{training.seconds_per_step * 1e3:.0f} ms",
            f"{comparison.speed(name):.2f}",
            "" if training.memory is None else f"{training.memory / 2**20:.0f} MiB",
        )
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 110)  # a pipe has no width of its own
    console.print(table)
    for name in list(comparison.trainings)[1:]:
        steps = len(comparison[name].losses)
        difference = comparison.largest_difference(name)
        console.print(f"{name}: the loss differs by {difference:.1e} at most, in {steps} steps.", highlight=False)

"""The harness of the training examples (examples/learning.py), on a model of two weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learning import BACKENDS, Panel, Run, chart, compare, report


def line(calls: list[tuple[str, int]], shift: float = 0.0):
    """Runs that fit a line to points drawn from torch's generator; fastattn's losses are `shift` off. `calls` records steps."""

    def make_run(backend: str) -> Run:
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(number: int) -> torch.Tensor:
            calls.append((backend, number))
            x = torch.randn(8, 1)
            loss = (model(x) - 3 * x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach() + (shift if backend == "fastattn" else 0)

        return Run(step, lambda: model.weight.item(), model)

    return make_run


@given(
    steps=st.integers(2, 40), stretch=st.integers(2, 12), every=st.none() | st.integers(1, 15), seed=st.integers(0, 9)
)
def test_runs_take_turns_and_meet_the_same_batches(steps, stretch, every, seed):
    calls = []
    comparison = compare(line(calls), steps, stretch=stretch, evaluate_every=every, seed=seed)
    for name in BACKENDS:
        assert [number for backend, number in calls if backend == name] == list(range(steps))
        training = comparison[name]
        turns = -(-steps // stretch)
        assert len(training.losses) == steps
        assert len(training.seconds) == steps - turns
        ends = {min(steps, (turn + 1) * stretch) for turn in range(turns)}
        due = {end for end in ends if every and end // every > max(0, end - 1 - (end - 1) % stretch) // every}
        assert set(training.metric) == {0, steps} | due
        assert training.final == training.run.model.weight.item()
    assert comparison.largest_difference() == 0
    longest = max(abs(calls.index(("eager", n)) - calls.index(("fastattn", n))) for n in range(steps))
    assert longest <= 2 * stretch  # neither ran far ahead


def test_a_difference_shows():
    comparison = compare(line([], shift=0.5), 4)
    assert comparison.largest_difference() == pytest.approx(0.5, abs=1e-6)
    assert comparison.speed("eager") == 1
    ratio = comparison["eager"].seconds_per_step / comparison["fastattn"].seconds_per_step
    assert comparison.speed() == ratio


def test_chart_and_report(tmp_path, capsys):
    comparison = compare(line([]), 6, stretch=3)
    path = chart(
        tmp_path / "new" / "line.png", "A line", comparison.losses(), comparison.metric("slope", {"the truth": 3.0})
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    assert chart(tmp_path / "one.png", "One", Panel("y", {"x": [(0, 1.0), (1, 2.0)]})).exists()
    report(comparison, "slope", {"the truth": 3.0}, form=".3f")
    printed = capsys.readouterr().out
    for word in ("eager", "fastattn", "3.000", f"{comparison['fastattn'].final:.3f}", "differs by 0.0e+00 at most"):
        assert word in printed


def test_a_metric_is_not_needed(tmp_path, capsys):
    comparison = compare(lambda backend: Run(lambda number: 1.0 / (number + 1)), 5, stretch=2)
    report(comparison, "accuracy")
    assert "0.2000" in capsys.readouterr().out


@pytest.mark.parametrize(("steps", "stretch"), [(1, 8), (0, 8), (8, 1)])
def test_too_few_steps(steps, stretch):
    with pytest.raises(ValueError, match=f"got {steps} and {stretch}"):
        compare(line([]), steps, stretch=stretch)

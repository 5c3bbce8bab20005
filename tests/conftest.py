"""What all tests share: hypothesis's settings, and fixtures for tests of kernels."""

from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch

from fastattn.backends.cpu import _native

# Derandomised: the same cases on every run and every machine. A kernel's speed is a benchmark's matter, hence no deadline.
hypothesis.settings.register_profile(
    "fastattn",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fastattn")


@pytest.fixture(params=_native.C.isas() if _native.available else ["none"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once for each instruction set that was built and that this machine has."""
    if not _native.available:
        pytest.fail(f"tests of CPU kernels need them: {_native.reason}")
    before = _native.C.isa()
    _native.C.select_isa(request.param)
    yield request.param
    _native.C.select_isa(before)


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.fixture
def same_bits_at_any_thread_count() -> Iterator[Callable[[Callable], None]]:
    """A function that runs its argument at one, two and three threads and compares the bits of the tensors it returns."""
    before = torch.get_num_threads()

    def check(function: Callable) -> None:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([_bits(tensor) for tensor in function()])
        assert results[0] == results[1] == results[2]

    yield check
    torch.set_num_threads(before)

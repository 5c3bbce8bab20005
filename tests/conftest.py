"""What all tests share: hypothesis's settings, and fixtures for tests of kernels.

FASTATTN_TEST_EXAMPLES=n draws n examples in every hypothesis test: few for slow builds (sanitize.sh), many to look for bugs.
FASTATTN_TEST_ISAS=a,b   runs the tests of kernels for these instruction sets alone.

Without a GPU the Triton kernels run in Triton's interpreter and the CUDA kernels in an emulation, where that was built; both have
to be asked for before fastattn is imported.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    if importlib.util.find_spec("triton") is not None:
        os.environ["TRITON_INTERPRET"] = "1"
    package = importlib.util.find_spec("fastattn")
    if package is not None and any(Path(package.submodule_search_locations[0]).glob("_cuda_emulated.*")):
        os.environ["FASTATTN_CUDA_EMULATED"] = "1"

import isas
from hypothesis.internal.conjecture import providers

from fastattn.backends.cpu import _native

# Derandomised: the same cases on every run and every machine. Few, since each instruction set draws some (more: see above).
# A kernel's speed is a benchmark's matter, hence no deadline.
hypothesis.settings.register_profile(
    "fastattn",
    deadline=None,
    derandomize=True,
    max_examples=18,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fastattn")
# Nor may cases depend on the numbers that stand in whatever modules this process has imported so far, as hypothesis would
# have it: another worker, or a changed line elsewhere, would draw others.
if hasattr(providers, "is_local_module_file"):
    providers.is_local_module_file = lambda path: False

ASKED_EXAMPLES = int(os.environ.get("FASTATTN_TEST_EXAMPLES", "0"))
INTERPRETED_EXAMPLES = 6  # Triton's interpreter takes its time; FASTATTN_TEST_EXAMPLES=60 draws more


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kernel: runs C++, and so is run under the sanitizers (sanitize.sh)")
    config.addinivalue_line(
        "markers", "any_lanes: about the parts of a large problem, which are the same for all vectors"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # A file with a test for every instruction set is a file of kernel tests.
    files = {item.path for item in items if "isa" in getattr(item, "fixturenames", ())}
    for item in items:
        if item.path in files:
            item.add_marker("kernel")
    same = [item for item in items if isas.same_as_in_avx512(item) or isas.fewer_lanes_than(item)]
    if same:
        config.hook.pytest_deselected(items=same)
        left_out = set(same)
        items[:] = [item for item in items if item not in left_out]


_own_settings: dict[Any, hypothesis.settings] = {}  # of the @given tests, or the profile's


def pytest_runtest_setup(item: pytest.Item) -> None:
    """How many examples a hypothesis test draws this time."""
    function = getattr(item, "obj", None)
    own = getattr(function, "_hypothesis_internal_use_settings", None)
    if own is None:
        return
    own = _own_settings.setdefault(function, own)
    arguments = getattr(item, "callspec", None)
    examples = own.max_examples
    if ASKED_EXAMPLES:
        examples = ASKED_EXAMPLES
    elif item.path.name.startswith("test_triton_") and not torch.cuda.is_available():
        examples = INTERPRETED_EXAMPLES
    elif arguments is not None and "isa" in arguments.params:
        examples = isas.share(arguments.params["isa"], examples)
    function._hypothesis_internal_use_settings = hypothesis.settings(own, max_examples=examples)


@pytest.fixture(params=isas.tested())
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


@pytest.fixture
def same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thousand logits or scores at a time, so that small calls of the losses take several stretches."""
    from fastattn.backends.triton import stretches

    for name, value in {"FEWEST": 2048, "SHORTEST": 16, "MULTIPLE": 16}.items():
        monkeypatch.setattr(stretches, name, value)

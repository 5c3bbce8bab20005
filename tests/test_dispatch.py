"""explain and use_backend: which backend runs a call, and why."""

import pytest
import torch
from samples import EVERY, SIMPLEST, Sample, tensors
from torch import Tensor

import fastattn
from fastattn.backends import ABSENT, BACKENDS

pytestmark = pytest.mark.usefixtures("same_random_numbers")

KERNELS = [backend for backend in BACKENDS if backend != "eager"]


@pytest.mark.parametrize("sample", EVERY)
def test_explain_names_the_backend_that_runs(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for backend in BACKENDS:
        module = BACKENDS[backend].get(sample.op)
        if module is not None and backend != "eager":
            forward = module.forward
            monkeypatch.setattr(module, "forward", lambda *a, b=backend, f=forward: (ran.append(b), f(*a))[1])
    args, kwargs = sample.arguments()
    state = torch.random.get_rng_state()
    explanation = fastattn.explain(sample.op, *args, **kwargs)
    assert torch.equal(torch.random.get_rng_state(), state), "explain drew random numbers"
    assert ran == []
    assert explanation.op == sample.op
    assert list(explanation.reasons) == list(BACKENDS)
    assert explanation.reasons[explanation.backend] is None
    lines = str(explanation).splitlines()
    assert lines[0] == f"{sample.op} runs on: {explanation.backend}"
    assert [line.split()[0] for line in lines[1:]] == list(BACKENDS)

    sample.function(*args, **kwargs)
    assert ran == [explanation.backend][: explanation.backend != "eager"]
    for backend, reason in explanation.reasons.items():
        ran.clear()
        args, kwargs = sample.arguments()
        with fastattn.use_backend(backend):
            if reason is None:
                sample.function(*args, **kwargs)
                assert ran == [backend][: backend != "eager"]
                assert fastattn.explain(sample.op, *args, **kwargs).backend == backend
            else:
                with pytest.raises(RuntimeError, match=f"{sample.op} cannot run on the {backend} backend") as error:
                    sample.function(*args, **kwargs)
                assert reason in str(error.value)
                assert ran == []


@pytest.mark.parametrize("sample", SIMPLEST, ids=str)
def test_float64_runs_on_eager_and_explain_says_why(sample: Sample) -> None:
    args, kwargs = sample.arguments(torch.float64)
    explanation = fastattn.explain(sample.op, *args, **kwargs)
    assert explanation.backend == "eager"
    for backend in KERNELS:
        reason = explanation.reasons[backend]
        assert "float64" in reason or reason in (ABSENT.get(backend), f"the {backend} backend has no {sample.op}")
    assert tensors(sample.function(*args, **kwargs))[0].dtype == torch.float64


def test_unknown_names_are_errors_that_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="there is no op 'attentoin'; choose one of attention, "):
        fastattn.explain("attentoin", torch.ones(1))
    with (
        pytest.raises(ValueError, match="there is no backend 'gpu'; choose one of 'cpu', 'cuda', 'triton', 'eager'"),
        fastattn.use_backend("gpu"),
    ):
        pass


def test_explain_raises_the_calls_own_errors_and_leaves_nothing_behind() -> None:
    with pytest.raises(ValueError, match="features"):
        fastattn.explain("linear", torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(TypeError):
        fastattn.explain("linear", torch.ones(2, 3), no_such_argument=1)
    assert isinstance(fastattn.linear(torch.ones(2, 3), torch.ones(4, 3)), Tensor)

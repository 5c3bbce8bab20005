"""Every class of fastattn.nn among torch's own tools: copies, files, checkpointing, export, mixed precision."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from nn_reference import randomise, tensors_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastattn
import fastattn.nn as fnn

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")


class Case(NamedTuple):
    """How a class is made, and the shapes (or integers) that it is called with. Dropout is on, in training."""

    make: Callable[[], nn.Module]
    inputs: tuple[tuple[int, ...] | int, ...]


# GELU: at a ReLU's corner a rounding turns a gradient on or off.
LAYER = {"d_model": 16, "nhead": 2, "dim_feedforward": 24, "dropout": 0.3, "activation": "gelu", "batch_first": True}
CASES = {
    "ALiBi": Case(lambda: fnn.ALiBi(3), (4, 6)),
    "AdditiveAttention": Case(lambda: fnn.AdditiveAttention(16, 12, 8, 0.3), ((2, 4, 16), (2, 5, 12))),
    "FeedForward": Case(lambda: fnn.FeedForward(16, 24, "silu", gated=True, dropout=0.3), ((2, 5, 16),)),
    "LayerNorm": Case(lambda: fnn.LayerNorm(16, dropout=0.3), ((2, 5, 16), (2, 5, 16))),
    "LearnedPositionalEncoding": Case(lambda: fnn.LearnedPositionalEncoding(16, 8, 0.3), ((5, 2, 16),)),
    "Linear": Case(lambda: fnn.Linear(16, 24), ((2, 5, 16),)),
    "MultiheadAttention": Case(
        lambda: fnn.MultiheadAttention(16, 2, 0.3, batch_first=True), ((2, 4, 16), (2, 5, 16), (2, 5, 16))
    ),
    "RMSNorm": Case(lambda: fnn.RMSNorm(16, dropout=0.3), ((2, 5, 16), (2, 5, 16))),
    "RelativePositionBias": Case(lambda: fnn.RelativePositionBias(3, 8, 12), (4, 6)),
    "RotaryEmbedding": Case(lambda: fnn.RotaryEmbedding(8), ((2, 4, 5, 8), (2, 2, 5, 8))),
    "SinusoidalPositionalEncoding": Case(lambda: fnn.SinusoidalPositionalEncoding(16, 8, 0.3), ((5, 2, 16),)),
    "Transformer": Case(
        lambda: fnn.Transformer(num_encoder_layers=1, num_decoder_layers=1, **LAYER), ((2, 5, 16), (2, 4, 16))
    ),
    "TransformerDecoder": Case(
        lambda: fnn.TransformerDecoder(fnn.TransformerDecoderLayer(**LAYER), 2), ((2, 4, 16), (2, 5, 16))
    ),
    "TransformerDecoderLayer": Case(lambda: fnn.TransformerDecoderLayer(**LAYER), ((2, 4, 16), (2, 5, 16))),
    "TransformerEncoder": Case(lambda: fnn.TransformerEncoder(fnn.TransformerEncoderLayer(**LAYER), 2), ((2, 5, 16),)),
    "TransformerEncoderLayer": Case(lambda: fnn.TransformerEncoderLayer(**LAYER), ((2, 5, 16),)),
}
TRAINED = [name for name in CASES if name != "ALiBi"]  # it is called with lengths and has no parameters


def make(name: str) -> tuple[nn.Module, list[Any]]:
    """(module with random parameters, inputs that require gradients)."""
    torch.manual_seed(0)
    module = CASES[name].make()
    randomise(module)
    inputs = [size if isinstance(size, int) else torch.randn(size).requires_grad_() for size in CASES[name].inputs]
    return module, inputs


def leaves(module: nn.Module, inputs: list[Any]) -> list[Tensor]:
    return tensors_of(inputs) + list(module.parameters())


def loss(outputs: Any) -> Tensor:
    """A sum in which every element of every output has a weight of its own."""
    return sum((torch.linspace(-1, 1, out.numel()) * out.float().flatten()).sum() for out in tensors_of(outputs))


def assert_equal(given: Any, expected: Any) -> None:
    for a, b in zip(tensors_of(given), tensors_of(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_every_class_has_a_case() -> None:
    assert sorted(CASES) == sorted(fnn.__all__)
    for name in CASES:
        assert type(make(name)[0]) is getattr(fnn, name)


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("name", CASES)
def test_a_copy_gives_the_same_and_shares_nothing(name: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    """Copied after a call, when whatever a module keeps between calls is there."""
    module, inputs = make(name)
    expected = module.eval()(*inputs)
    twin = copied(module)
    assert type(twin) is type(module)
    assert not twin.training
    assert_equal(twin(*inputs), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_equal(module(*inputs), expected)


@pytest.mark.parametrize("name", CASES)
def test_a_state_dict_passes_through_a_file_of_weights_only(name: str) -> None:
    module, inputs = make(name)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    other = CASES[name].make()
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert_equal(other.eval()(*inputs), module.eval()(*inputs))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", TRAINED)
def test_checkpointing_gives_the_same_bits(name: str, reentrant: bool) -> None:
    """In training: what is computed again has to drop the same elements."""
    module, inputs = make(name)
    # Reentrant checkpointing looks at the inputs alone, and some modules are called with lengths.
    anchor = torch.zeros((), requires_grad=True)
    results = []
    for call in (
        lambda run: run(anchor, *inputs),
        lambda run: checkpoint(run, anchor, *inputs, use_reentrant=reentrant),
    ):
        torch.manual_seed(2)
        module.zero_grad()
        for tensor in tensors_of(inputs):
            tensor.grad = None
        outputs = call(lambda _, *arguments: module(*arguments))
        loss(outputs).backward()
        results.append((outputs, [tensor.grad for tensor in leaves(module, inputs)]))
    assert_equal(results[1], results[0])


@pytest.mark.parametrize("name", CASES)
def test_export_gives_the_same(name: str) -> None:
    module, inputs = make(name)
    module.eval()
    exported = torch.export.export(module, tuple(inputs))
    with torch.no_grad():
        assert_equal(exported.module()(*inputs), module(*inputs))


def outputs_and_gradients(module: nn.Module, inputs: list[Any]) -> Tensor:
    """Everything in one float64 vector: outputs, gradients of inputs and of parameters."""
    outputs = module(*inputs)
    total = loss(outputs)
    gradients = torch.autograd.grad(total, leaves(module, inputs)) if total.requires_grad else ()
    return torch.cat([tensor.detach().double().flatten() for tensor in (*tensors_of(outputs), *gradients)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_autocast_errs_no_further_than_eager_does(name: str, dtype: torch.dtype) -> None:
    """At most twice, as one length of all errors: the largest of few elements is a matter of luck in such short types."""
    module, inputs = make(name)
    module.eval()
    reference = outputs_and_gradients(module, inputs)
    with torch.autocast("cpu", dtype):
        fast = outputs_and_gradients(module, inputs)
        with fastattn.use_backend("eager"):
            eager = outputs_and_gradients(module, inputs)
    rounding = torch.finfo(torch.float32).eps * reference.norm()
    assert (fast - reference).norm() <= 2 * (eager - reference).norm() + 4 * rounding
    assert (eager - reference).norm() <= 4 * torch.finfo(dtype).eps * reference.norm()  # or the test would say nothing


@pytest.mark.parametrize("name", TRAINED)
def test_a_step_with_a_gradient_scaler_is_the_step_without(name: str) -> None:
    steps = []
    for enabled in (True, False):
        module, inputs = make(name)
        module.eval()
        optimizer = torch.optim.SGD(leaves(module, inputs), lr=1.0)
        before = torch.cat([leaf.detach().flatten() for leaf in leaves(module, inputs)])
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=enabled)
        with torch.autocast("cpu", torch.float16, enabled=enabled):
            outputs = module(*inputs)
        scaler.scale(loss(outputs)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (256.0 if enabled else 1.0)  # halved where the step was skipped
        steps.append(torch.cat([leaf.detach().flatten() for leaf in leaves(module, inputs)]) - before)
    scaled, plain = steps
    assert (scaled - plain).norm() <= 4 * torch.finfo(torch.float16).eps * plain.norm()

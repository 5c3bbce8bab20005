"""The encoder layer's kernel: numerics, packed and not, in both orders; weights that change; nothing unchecked."""

import hypothesis.strategies as st
import pytest
import torch
from encoder_cases import NAMES, weights
from hypothesis import given
from isas import draw_dtype
from linear_cases import MATRICES, VECTORS
from norm_cases import DTYPES, check_refused
from torch import Tensor

import fastattn
from fastattn import verify
from fastattn.backends.cpu import _native, encoder_layer

pytestmark = pytest.mark.kernel


@given(data=st.data())
def test_outputs_obey_the_numerics_rule(isa: str, data: st.DataObject) -> None:
    draw = data.draw
    dtype, seed = draw_dtype(draw, DTYPES), draw(st.integers(0, 99))
    heads, head_dim = draw(st.integers(1, 4)), draw(st.sampled_from([1, 8, 17, 32]))
    width, hidden = draw(st.sampled_from([1, 16, 33, 96])), draw(st.sampled_from([1, 40, 130]))
    args = weights(width, heads * head_dim, hidden, dtype, seed)
    for name in args:
        if name[0] != "w" and draw(st.integers(0, 5)) == 0:
            args[name] = None
        elif name[0] == "w" and draw(st.booleans()):
            args[name] = args[name].T.contiguous().T
        elif name.startswith("norm") and draw(st.booleans()):
            args[name] = args[name].float()
    torch.manual_seed(seed)
    if draw(st.booleans()):
        lengths = draw(st.lists(st.sampled_from([0, 1, 5, 40, 300]), min_size=1, max_size=9))
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        x = torch.randn(1, sum(lengths), width).to(dtype)
        packing = {"cu_seqlens": cu_seqlens, "max_seqlen": max(lengths) + draw(st.integers(0, 2))}
    else:
        x = torch.randn(draw(st.integers(0, 5)), draw(st.sampled_from([0, 1, 7, 400])), width).to(dtype)
        packing = {}
    verify.check(
        fastattn.encoder_layer,
        x,
        **args,
        heads=heads,
        activation=draw(st.sampled_from([None, "relu", "gelu", "gelu_tanh", "silu"])),
        eps1=1e-3,
        norm_first=draw(st.booleans()),
        **packing,
        backend="cpu",
    ).raise_if_failed()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_first", [False, True])
def test_many_sequences_go_through_in_parts(isa: str, dtype: torch.dtype, norm_first: bool) -> None:
    """More rows than are taken at a time: as if each sequence were alone."""
    torch.manual_seed(0)
    args = weights(48, 64, 100, dtype)
    lengths = [700, 3, 500, 1, 1200, 30, 30, 900]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    x = torch.randn(1, sum(lengths), 48).to(dtype)
    options = {**args, "heads": 2, "norm_first": norm_first}
    with fastattn.use_backend("cpu"):
        out = fastattn.encoder_layer(x, **options, cu_seqlens=cu_seqlens, max_seqlen=1200)
        alone = [fastattn.encoder_layer(part, **options) for part in x.split(lengths, dim=1)]
    with fastattn.use_backend("eager"):
        wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}
        parts = [
            (fastattn.encoder_layer(part, **options), fastattn.encoder_layer(part.double(), **wide))
            for part in x.split(lengths, dim=1)
        ]
    eager, reference = (torch.cat(side, dim=1) for side in zip(*parts, strict=True))
    for found in (out, torch.cat(alone, dim=1)):
        comparison = verify.compare(found, eager, reference)
        assert comparison.passed, comparison


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(isa, same_bits_at_any_thread_count, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    args, x = weights(96, 96, 200, dtype), torch.randn(7, 300, 96).to(dtype)
    with fastattn.use_backend("cpu"):
        same_bits_at_any_thread_count(lambda: [fastattn.encoder_layer(x, **args, heads=3)])


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_that_changes_counts_from_the_next_call_on(name: str) -> None:
    torch.manual_seed(0)
    args, x = weights(16, 32, 24, torch.float32), torch.randn(2, 5, 16)
    before = fastattn.encoder_layer(x, **args, heads=2)
    args[name].data += torch.randn_like(args[name])  # unseen by torch's version counters
    after = fastattn.encoder_layer(x, **args, heads=2)
    with fastattn.use_backend("eager"):
        expected = fastattn.encoder_layer(x, **args, heads=2)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)
    # A bias of the keys shifts all scores of a row alike.
    assert torch.allclose(before, after, atol=1e-5) == (name == "b_key")


def test_no_argument_reaches_the_kernel_unchecked() -> None:
    args = weights(6, 4, 6, torch.float32)
    good = {"x": torch.randn(1, 4, 6), **args, "cu_seqlens": torch.tensor([0, 1, 4], dtype=torch.int32)}
    good |= {"out": torch.empty(1, 4, 6), "heads": 2, "max_seqlen": 3, "activation": "gelu", "eps1": 1e-5, "eps2": 1e-5}
    good |= {"scale": 0.5, "norm_first": False}
    ends = [torch.tensor(e, dtype=torch.int32) for e in ([1, 4], [0, 5], [0, 3, 2, 4], [0, 4], [[0, 4]])]
    gaps = MATRICES[2]  # a weight may have them
    matrices = [matrix for matrix in MATRICES if matrix is not gaps] + [None]
    wrong = {name: matrices if name[0] == "w" else list(VECTORS) for name in args}
    wrong |= {"x": [*MATRICES, None], "out": [*MATRICES, None], "cu_seqlens": [*ends, torch.tensor([0, 4]), "text"]}
    wrong |= {"heads": [0, -1, 3, "two"], "max_seqlen": [2, "text"], "activation": ["tanh", None]}
    check_refused(_native.C.encoder_layer_forward, good, wrong)


@pytest.mark.parametrize(
    ("x", "why"), [(torch.zeros(1, 2, 6).double(), "float64"), (torch.zeros(1, 2, 6).to("meta"), "meta")]
)
def test_unsupported_says_why(x: Tensor, why: str) -> None:
    args = [value.to(x.dtype) for value in weights(6, 4, 6, torch.float32).values()]
    reason = encoder_layer.unsupported(x, *args, None, 2, 2, "gelu", 1e-5, 1e-5, 0.5, False)
    assert reason is not None
    assert why in reason

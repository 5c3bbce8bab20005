"""The encoder layer in Triton, a composition of the other kernels, against the eager definition."""

import pytest
import torch
from encoder_cases import weights
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_backend import DEVICE, check, chips, dtypes, needs_triton

import fastattn

pytestmark = needs_triton


@settings(max_examples=16)
@given(data=st.data(), dtype=dtypes, chip=chips)
def test_outputs_obey_the_numerics_rule(data: st.DataObject, dtype: torch.dtype, chip: str) -> None:
    draw = data.draw
    seed, heads, head_dim = draw(st.integers(0, 99)), draw(st.integers(1, 3)), draw(st.sampled_from([8, 17, 32]))
    width, hidden = draw(st.sampled_from([16, 33, 96])), draw(st.sampled_from([40, 130]))
    args = weights(width, heads * head_dim, hidden, dtype, seed)
    for name in args:
        if name[0] != "w" and draw(st.integers(0, 5)) == 0:
            args[name] = None
        elif name[0] == "w" and draw(st.booleans()):
            args[name] = args[name].T.contiguous().T
        elif name.startswith("norm") and draw(st.booleans()):
            args[name] = args[name].float()
    torch.manual_seed(seed)
    packing = {}
    if draw(st.booleans()):
        lengths = draw(st.lists(st.sampled_from([0, 1, 5, 40, 70]), min_size=1, max_size=4))
        packing["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        packing["max_seqlen"] = max(lengths) + draw(st.integers(0, 2))
        x = torch.randn(1, sum(lengths), width).to(dtype)
    else:
        x = torch.randn(draw(st.integers(0, 3)), draw(st.sampled_from([0, 1, 7, 70])), width).to(dtype)
    activation, norm_first = draw(st.sampled_from([None, "relu", "gelu", "gelu_tanh", "silu"])), draw(st.booleans())
    check(
        fastattn.encoder_layer,
        chip,
        x,
        **args,
        heads=heads,
        activation=activation,
        eps1=1e-3,
        norm_first=norm_first,
        **packing,
    )


@pytest.mark.parametrize(("width", "inner", "why"), [(17000, 32, "16384 features"), (32, 520, "256")])
def test_unsupported_says_why(width: int, inner: int, why: str) -> None:
    from fastattn.backends.triton import encoder_layer

    args = [value.to(DEVICE) for value in weights(width, inner, 8, torch.float32).values()]
    x = torch.zeros(1, 2, width, device=DEVICE)
    assert why in encoder_layer.unsupported(x, *args, None, 1, 2, "gelu", 1e-5, 1e-5, 0.5, False)

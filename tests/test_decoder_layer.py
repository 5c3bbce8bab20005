"""The decoder layer's kernel: numerics, the cache, weights that change, nothing unchecked; and when a model runs on it."""

import copy

import hypothesis.strategies as st
import pytest
import torch
from decoder_cases import NAMES, cases, run, weights
from hypothesis import given
from isas import draw_dtype
from linear_cases import MATRICES, VECTORS
from norm_cases import DTYPES, check_refused
from torch import Tensor, nn

import fastattn
from fastattn import ops, verify
from fastattn.backends.cpu import _native, decoder_layer
from fastattn.models import DecoderLM, DecoderLMConfig

pytestmark = pytest.mark.kernel


@given(data=st.data())
def test_outputs_and_caches_obey_the_numerics_rule(isa: str, data: st.DataObject) -> None:
    tensors, options = cases(data.draw, draw_dtype(data.draw, DTYPES))
    verify.check(run, *tensors, **options, backend="cpu").raise_if_failed()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(isa, same_bits_at_any_thread_count, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    args, x = weights(256, 6, 2, 64, 700, dtype), torch.randn(3, 2, 256).to(dtype)
    caches = [torch.randn(3, 2, 900, 64).to(dtype) for _ in range(2)]
    lengths = torch.tensor([800, 0, 30], dtype=torch.int32)
    with fastattn.use_backend("cpu"):
        same_bits_at_any_thread_count(lambda: run(x, *caches, **args, cache_seqlens=lengths))


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_that_changes_counts_from_the_next_call_on(name: str) -> None:
    torch.manual_seed(0)
    args, x = weights(16, 4, 2, 8, 24, torch.float32), torch.randn(2, 1, 16)
    args |= {"cache_seqlens": torch.tensor([5, 0], dtype=torch.int32)}
    caches = [torch.randn(2, 2, 6, 8) for _ in range(2)]
    before = run(x, *caches, **args)[0]
    args[name].data += torch.randn_like(args[name])  # unseen by torch's version counters
    after = run(x, *caches, **args)[0]
    with fastattn.use_backend("eager"):
        expected = run(x, *caches, **args)[0]
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, after, atol=1e-5)


def test_no_argument_reaches_the_kernel_unchecked() -> None:
    args = weights(6, 4, 2, 4, 6, torch.float32)
    good = {"x": torch.randn(2, 1, 6), "k_cache": torch.randn(2, 2, 5, 4), "v_cache": torch.randn(2, 2, 5, 4)}
    good |= {"cache_seqlens": torch.tensor([4, 0], dtype=torch.int32), **args, "cos": torch.randn(1, 4)}
    good |= {"sin": torch.randn(1, 4), "out": torch.empty(2, 1, 6), "activation": "gelu", "norm": "layer"}
    good |= {"eps1": 1e-5, "eps2": 1e-5, "scale": 0.5}
    gaps = MATRICES[2]  # a weight may have them
    matrices = [matrix for matrix in MATRICES if matrix is not gaps]
    wrong = {name: matrices + [None] * (name != "w_gate") if name[0] == "w" else list(VECTORS) for name in args}
    lengths = [torch.tensor(e, dtype=torch.int32) for e in ([5, 0], [-1, 0], [4], [[4, 0]])]
    caches = [torch.randn(2, 2, 5, 3), torch.randn(1, 2, 5, 4).expand(2, 2, 5, 4), torch.randn(2, 3, 5, 4)]
    caches += [torch.randn(2, 0, 5, 4), torch.randn(2, 2, 5, 4).double(), torch.randn(2, 2, 4, 4), None]
    wrong |= {"x": [*MATRICES, None], "out": [*MATRICES, None], "k_cache": caches, "v_cache": caches}
    wrong |= {"cache_seqlens": [*lengths, torch.tensor([4, 0]), None, "text"], "activation": ["tanh", None]}
    wrong |= {"norm": ["batch", None, "rms"]}  # RMS norm has no bias
    angles = [torch.randn(1, 3), torch.randn(1, 6), torch.randn(2, 4), torch.ones(4), torch.randn(1, 8)[:, ::2], None]
    wrong |= {"cos": angles, "sin": angles}
    check_refused(_native.C.decoder_layer_forward, good, wrong)


@pytest.mark.parametrize(
    ("x", "why"), [(torch.zeros(2, 1, 6).double(), "float64"), (torch.zeros(2, 1, 6).to("meta"), "meta")]
)
def test_unsupported_says_why(x: Tensor, why: str) -> None:
    args = {name: value.to(x.dtype) for name, value in weights(6, 4, 2, 4, 6, torch.float32).items()}
    cache, angles = torch.zeros(2, 2, 5, 4, dtype=x.dtype), torch.zeros(1, 4)
    lengths = torch.zeros(2, dtype=torch.int32)
    reason = decoder_layer.unsupported(x, cache, cache, lengths, *args.values(), angles, angles)
    assert reason is not None
    assert why in reason


# ---- In a model ------------------------------------------------------------------------------------------------------


@pytest.fixture
def whole_layers(monkeypatch):
    """How many layers have run as one op."""
    calls = []
    fused = ops.decoder_layer
    monkeypatch.setattr(ops, "decoder_layer", lambda *args, **kwargs: (calls.append(1), fused(*args, **kwargs))[1])
    return calls


CONFIGS = {
    "gpt": DecoderLMConfig(50, 32, 3, 4, dropout=0.1, attention_dropout=0.1),
    "llama": DecoderLMConfig.llama_like(50, 32, 3, 4, kv_heads=2),
}


def read(model: DecoderLM) -> Tensor:
    """Hidden states of tokens that are read behind two prompts, one and then three at a time."""
    torch.manual_seed(1)
    cache = model.new_cache(2, 5, 4)
    ids, ends = torch.randint(50, (8,)), torch.tensor([0, 3, 8], dtype=torch.int32)
    model.prefill(ids, ends, 5, cache)
    return torch.cat([model.decode(torch.randint(50, (2, new)), cache) for new in (1, 3)], dim=1)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_reads_new_tokens_by_whole_layers(kind: str, whole_layers, monkeypatch) -> None:
    torch.manual_seed(0)
    model = DecoderLM(CONFIGS[kind]).eval()
    found = read(model)
    assert len(whole_layers) == 2 * 3
    monkeypatch.setattr(ops, "decoder_layer", None)  # the parts do not ask for it
    for layer in model.layers:
        layer.attention.register_forward_hook(lambda *_: None)
    parts = read(model)
    with fastattn.use_backend("eager"):
        reference = read(copy.deepcopy(model).double())
    comparison = verify.compare(found, parts, reference)
    assert comparison.passed, comparison


class Adapted(nn.Module):
    """A linear layer with something beside it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        return self.linear(x, *rest) + 1.0


@pytest.mark.parametrize(
    "part",
    [
        *("attention", "attention.qkv", "attention.out", "norm1", "norm2"),
        *("feed_forward", "feed_forward.linear1", "feed_forward.linear2", "feed_forward.linear_gate"),
    ],
)
@pytest.mark.parametrize("how", ["hooked", "replaced"])
def test_a_part_that_is_more_than_its_weights_is_called(part: str, how: str, whole_layers) -> None:
    torch.manual_seed(0)
    model = DecoderLM(CONFIGS["llama"]).eval()
    plain = read(model)
    assert len(whole_layers) == 2 * 3
    module, called = model.layers[1].get_submodule(part), []
    if how == "hooked":
        module.register_forward_hook(lambda *_: called.append(1))
    elif isinstance(module, nn.Linear):
        model.layers[1].set_submodule(part, Adapted(module))
    else:
        original = module.forward

        def replaced(*args, **kwargs):
            called.append(1)
            out = original(*args, **kwargs)
            return (out[0] + 1.0, out[1]) if isinstance(out, tuple) else out + 1.0

        module.forward = replaced
    changed = read(model)
    assert len(whole_layers) == 2 * 3 + 2 * 2  # the other two layers
    if how == "hooked":
        assert len(called) == 3
        torch.testing.assert_close(changed, plain, rtol=1e-4, atol=1e-5)
    else:
        assert not torch.allclose(changed, plain, atol=1e-3)


def test_dropout_in_training_runs_the_parts(whole_layers) -> None:
    torch.manual_seed(0)
    model = DecoderLM(CONFIGS["gpt"])
    with torch.no_grad():
        read(model)
    assert not whole_layers

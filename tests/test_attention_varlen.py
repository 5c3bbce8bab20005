"""Attention over packed sequences on the CPU, forward and backward, against the eager definition."""

import torch
from attention_cases import AttentionCase, varlen_cases
from hypothesis import given, settings
from norm_cases import check_refused

import fastattn
from fastattn import verify
from fastattn.backends.cpu import _native


@settings(max_examples=100)
@given(case=varlen_cases())
def test_outputs_and_gradients_obey_the_numerics_rule(isa: str, case: AttentionCase) -> None:
    verify.check(fastattn.attention_varlen, *case.tensors, backend="cpu", **case.options).raise_if_failed()


def test_results_are_those_of_each_sequence_alone(isa: str) -> None:
    """What stands beside a sequence in the pack does not touch its result."""
    torch.manual_seed(0)
    lengths = (5, 0, 130, 33)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    query, key, value = (torch.randn(sum(lengths), 2, 24) for _ in range(3))
    out = fastattn.attention_varlen(query, key, value, cu, cu, 130, 130, is_causal=True)
    for b, length in enumerate(lengths):
        part = slice(int(cu[b]), int(cu[b + 1]))
        one = torch.tensor([0, length], dtype=torch.int32)
        alone = fastattn.attention_varlen(query[part], key[part], value[part], one, one, length, length, is_causal=True)
        torch.testing.assert_close(out[part], alone, rtol=1e-6, atol=1e-6)


def arguments() -> dict:
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    return {
        **{name: torch.randn(5, 4, 6) for name in ("query", "key", "value", "out")},
        "cu_seqlens_q": cu,
        "cu_seqlens_k": cu,
        "attn_mask": torch.zeros(2, 4, 3, 3),
        "alibi_slopes": torch.ones(2, 4),
        "seed": torch.tensor([1]),
        "lse": torch.empty(4, 5),
        "max_seqlen_q": 3,
        "max_seqlen_k": 3,
        "scale": 1.0,
        "window_left": -1,
        "window_right": 0,
        "softcap": 0.0,
        "dropout_p": 0.5,
    }


def test_no_argument_reaches_the_kernel_unchecked() -> None:
    good = arguments()
    matrices = (
        None,
        torch.randn(5, 4),
        torch.randn(6, 4, 6),
        torch.randn(5, 3, 7),
        torch.randn(5, 4, 6).double(),
        torch.empty(5, 4, 6, device="meta"),
        3,
    )
    lengths = (
        None,
        torch.tensor([0, 2, 5]),
        torch.tensor([0, 5], dtype=torch.int32),
        torch.tensor([0, 3, 2, 5], dtype=torch.int32),
        torch.tensor([0, 6, 5], dtype=torch.int32),
        torch.tensor([1, 2, 5], dtype=torch.int32),
        torch.tensor([0, 2, 6], dtype=torch.int32),
        torch.tensor([0, 1, 5], dtype=torch.int32),
        torch.tensor([0, -1, 5], dtype=torch.int32),
        torch.tensor([0, 9, 2, 9, 5, 9], dtype=torch.int32)[::2],
        torch.tensor([], dtype=torch.int32),
    )
    wrong = dict.fromkeys(("query", "key", "value", "out", "lse"), matrices)
    wrong |= {"cu_seqlens_q": lengths, "cu_seqlens_k": lengths}
    wrong |= {"max_seqlen_q": (None, 2, -1), "max_seqlen_k": (None, 2, -1), "attn_mask": matrices[1:]}
    check_refused(_native.C.attention_varlen_forward, good, wrong)

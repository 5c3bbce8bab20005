"""The instruction sets that kernels are tested on, and what need not be tested on each of them."""

import os
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
import torch

from fastattn.backends.cpu import _native

BFLOAT16_ALONE = {"avx512_bf16", "amx", "emulated512_bf16", "emulated_amx"}  # what sets them apart from AVX-512
WITHOUT_PRODUCTS = {"test_layer_norm", "test_rms_norm", "test_rotary_embedding"}  # and that in products alone


def tested() -> list[str]:
    """All that were built and that this machine has, or those that FASTATTN_TEST_ISAS names."""
    if not _native.available:
        return ["none"]
    asked = [name for name in os.environ.get("FASTATTN_TEST_ISAS", "").split(",") if name]
    return asked or _native.C.isas()


def share(isa: str, examples: int) -> int:
    """How many of a test's examples this instruction set draws: all where its vectors are longest, else four tenths.

    The sources are the same for all; what differs is the number of lanes, and bfloat16.
    """
    longest = next((name for name in ("avx512", "emulated512", "avx2") if name in tested()), isa)
    return examples if isa == longest or len(tested()) == 1 else max(1, examples * 2 // 5)


def _avx512_is_tested() -> bool:
    return not {"avx512", "emulated512"}.isdisjoint(tested())


def _beside_avx512(isa: str | None) -> bool:
    return isa in BFLOAT16_ALONE and _avx512_is_tested()


def same_as_in_avx512(item: pytest.Item) -> bool:
    """Whether the test runs code that is compiled for AVX-512, too, and is tested there."""
    arguments = getattr(item, "callspec", None)
    if arguments is None or not _beside_avx512(arguments.params.get("isa")):
        return False
    other_dtype = arguments.params.get("dtype", torch.bfloat16) in (torch.float32, torch.float16)
    return other_dtype or item.path.stem in WITHOUT_PRODUCTS


def fewer_lanes_than(item: pytest.Item) -> bool:
    """Whether the test is about threads or the parts of a large problem, which are cut alike for any number of lanes, and its
    instruction set has fewer of them than another one that is tested."""
    arguments = getattr(item, "callspec", None)
    if arguments is None or arguments.params.get("isa") not in ("portable", "avx2"):
        return False
    about = "same_bits_at_any_thread_count" in item.fixturenames or item.get_closest_marker("any_lanes") is not None
    return about and _avx512_is_tested()


def draw_dtype(draw: st.DrawFn, dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """One of them; bfloat16, if it is among them, where the instruction set in use differs from AVX-512 in that alone."""
    dtype = draw(st.sampled_from(dtypes))
    alone = _native.available and _beside_avx512(_native.C.isa()) and torch.bfloat16 in dtypes
    return torch.bfloat16 if alone else dtype

"""What is measured: a module an op, each with `cases(quick)`; `quick` gives one small case a direction.

A module with `gpu_cases()` is measured on a GPU, too, at sizes that fill one.
"""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

from ..harness import Case
from . import (
    additive_attention,
    attention,
    attention_summary,
    attention_varlen,
    attention_with_kvcache,
    decoder_lm,
    encoder_layer,
    feed_forward,
    generation,
    info_nce,
    language_model,
    layer_norm,
    linear,
    linear_cross_entropy,
    minilm,
    overhead,
    rms_norm,
    rotary_embedding,
    threads,
)

_MODULES: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        attention,
        attention_varlen,
        attention_with_kvcache,
        attention_summary,
        additive_attention,
        layer_norm,
        rms_norm,
        linear,
        feed_forward,
        rotary_embedding,
        linear_cross_entropy,
        info_nce,
        encoder_layer,
        language_model,
        decoder_lm,
        generation,
        minilm,
        overhead,
        threads,
    )
}


def _on_gpu(module: ModuleType) -> Callable[[bool], list[Case]]:
    """The module's cases for a GPU; the small ones are the same."""
    return lambda quick: [
        replace(case, device="cuda") for case in (module.cases(True) if quick else module.gpu_cases())
    ]


CASES: dict[str, Callable[[bool], list[Case]]] = {name: module.cases for name, module in _MODULES.items()}
GPU_CASES: dict[str, Callable[[bool], list[Case]]] = {
    name: _on_gpu(module) for name, module in _MODULES.items() if hasattr(module, "gpu_cases")
}

"""What is measured: a module an op, each with `cases(quick)`. `quick` gives one small case a direction."""

from collections.abc import Callable

from ..harness import Case
from . import (
    additive_attention,
    attention,
    attention_varlen,
    attention_with_kvcache,
    encoder_layer,
    feed_forward,
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

CASES: dict[str, Callable[[bool], list[Case]]] = {
    module.__name__.rpartition(".")[2]: module.cases
    for module in (
        attention,
        attention_varlen,
        attention_with_kvcache,
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
        minilm,
        overhead,
        threads,
    )
}

"""What is measured: a module an op, each with `cases(quick)`. `quick` gives one small case a direction."""

from collections.abc import Callable

from ..harness import Case
from . import (
    attention,
    attention_varlen,
    attention_with_kvcache,
    encoder_layer,
    feed_forward,
    layer_norm,
    linear,
    overhead,
    rms_norm,
)

CASES: dict[str, Callable[[bool], list[Case]]] = {
    module.__name__.rpartition(".")[2]: module.cases
    for module in (
        attention,
        attention_varlen,
        attention_with_kvcache,
        layer_norm,
        rms_norm,
        linear,
        feed_forward,
        encoder_layer,
        overhead,
    )
}

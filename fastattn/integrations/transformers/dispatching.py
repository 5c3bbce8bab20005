"""Turns transformers models to fastattn's attention and back, and says which cannot be turned."""

import inspect
from collections.abc import Iterable, Iterator

from torch import nn
from transformers import PreTrainedModel

from .attention import NAME

# Where a model keeps what its configurations said before: [(configuration, attention implementation), ...].
_PREVIOUS = "_fastattn_previous_attention"


def dispatch_attention(modules: dict[str, nn.Module]) -> dict[str, str]:
    """Sets the attention implementation of every transformers model among these modules.

    Args:
        modules: a whole model, as from `named_modules()`.

    Returns:
        The names of the models that were left, and why.
    """
    models = {name: module for name, module in modules.items() if isinstance(module, PreTrainedModel)}
    refused = {
        name: "its attention is hard-coded: the model does not ask transformers' attention registry, so that only its "
        "other parts can be accelerated"
        for name, model in models.items()
        if not model._can_set_attn_implementation()
    }
    # First all are remembered, then all are changed: models share configurations with those inside them.
    for name, model in models.items():
        if name not in refused and not hasattr(model, _PREVIOUS):
            setattr(
                model, _PREVIOUS, [(config, config._attn_implementation) for config in _configurations(model.config)]
            )
    for name, model in models.items():
        if name not in refused and model.config._attn_implementation != NAME:
            try:
                model.set_attn_implementation(NAME)
            except ValueError as error:
                refused[name] = f"transformers refuses to change its attention: {error}"
    return {name: reason for name, reason in refused.items() if not _inside_of(name, reason, refused)}


def undispatch_attention(modules: Iterable[nn.Module]) -> None:
    """Gives every configuration the attention implementation that it had before `dispatch_attention`."""
    for module in modules:
        for config, previous in module.__dict__.pop(_PREVIOUS, ()):
            config._attn_implementation = previous


def dispatches(module: nn.Module) -> bool:
    """Whether this is an attention module whose attention is now fastattn's."""
    config = getattr(module, "config", None)
    if getattr(config, "_attn_implementation", None) != NAME:
        return False
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _configurations(config) -> Iterator:
    """A configuration and those inside it, the outer first."""
    yield config
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if inner is not None:
            yield from _configurations(inner)


def _inside_of(name: str, reason: str, refused: dict[str, str]) -> bool:
    """Whether a model around this one is refused for the same reason, which need not be said twice."""
    return any(
        other != name and refused[other] == reason and (other == "" or name.startswith(f"{other}."))
        for other in refused
    )

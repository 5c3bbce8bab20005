"""`fastattn.accelerate(model)`: puts fused kernels into a model that exists, in place, and `fastattn.restore(model)`
takes them out.

    every module, by its class     takes on a fused class (integrations/swap.py); tables: integrations/torch_nn.py
                                   and integrations/transformers/families.py
    every transformers model       asks transformers' registry for attention under the name "fastattn"

Weights are shared, not copied; the `state_dict` does not change.
"""

import importlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .integrations import swap

__all__ = ["Left", "Replaced", "Report", "accelerate", "restore"]

_ATTENTION = "fused attention, through transformers' registry"

# Why modules that compute something are left, by class; of others fastattn knows nothing.
_LEFT = {
    "Linear": "a linear layer on its own: torch's matrix product runs",
    "Conv1D": "a linear layer on its own: torch's matrix product runs",
    "NonDynamicallyQuantizableLinear": "a linear layer on its own: torch's matrix product runs",
    "Embedding": "a look-up: torch's runs",
}


@dataclass(frozen=True)
class Replaced:
    """A module that is accelerated.

    Attributes:
        name: its name in the model, as in `named_modules()`.
        module: the name of its original class.
        by: what runs instead.
    """

    name: str
    module: str
    by: str


@dataclass(frozen=True)
class Left:
    """A module that was left as it is.

    Attributes:
        name: its name in the model, as in `named_modules()`; empty for the model itself.
        module: the name of its class.
        reason: why.
    """

    name: str
    module: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What `accelerate` did. `print(report)` shows it as two tables.

    Attributes:
        replaced: the modules that are accelerated.
        left: the modules that compute something and were left, each with the reason.
    """

    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        lines = [f"fastattn: {len(self.replaced)} modules accelerated, {len(self.left)} left"]
        if self.replaced:
            lines += ["", "accelerated", *_table((entry.module, entry.by) for entry in self.replaced)]
        if self.left:
            lines += ["", "left", *_table((entry.module, entry.reason) for entry in self.left)]
        return "\n".join(lines)


def _table(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    counts = Counter(rows)
    width = max(len(module) for module, _ in counts)
    for (module, text), count in counts.items():
        yield f"  {count:>4} x {module:<{width}}  {text}"


def accelerate(model: nn.Module, *, unpad: bool = True) -> Report:
    """Replaces what fastattn knows inside a model by fused kernels, in place.

    It knows torch.nn's Transformer family and norms, and of Hugging Face transformers the families named in
    `fastattn/integrations/transformers/families.py`; in any other transformers model that dispatches its attention, the
    attention, and every `nn.LayerNorm`. The model computes what it did, up to rounding, in training and evaluation,
    under autocast and with gradient checkpointing. Weights are shared, and `state_dict()` is unchanged. A second call
    changes nothing; a copy or a pickle of the model is accelerated too. `restore` undoes it.

    What differs, besides speed:

    - An encoder of the BERT kind leaves padding out: its last hidden state is zero there, and forward hooks on its
      inner modules see (1, tokens, …). This rests on the 2-D attention mask; with another mask, and where hidden states
      or attentions are asked for, padding is computed as ever.
      Transformers' own loss of a `…ForQuestionAnswering` counts padding as places that an answer may have, and so differs
      on padded batches; the scores of tokens do not. `unpad=False` gives that loss as it was.
    - A query that sees no key at all (padding on the left, in a decoder) gets zeros, not the mean of all values.
    - `output_attentions=True` runs the model's own eager attention, with a warning.
    - A transformers configuration is changed as by `model.set_attn_implementation("fastattn")`; models that share the
      configuration object share the change.
    - Forward hooks on the parts of a fused module, registered before the call or after it, are honoured by calling the
      part as the module it is, unfused.

    Args:
        model: any module; it may hold transformers models among others.
        unpad: whether encoders leave padding out.

    Returns:
        What was replaced, what was left, and why. Nothing is left in silence.

    Raises:
        TypeError: model is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module, to be changed in place")
    modules = dict(model.named_modules())
    refused = {name: reason for name, module in modules.items() if (reason := _take_on(module, unpad))}
    transformers = transformers_among(modules.values())
    if transformers is not None:
        refused |= transformers.dispatch_attention(modules)
    return _report(modules, refused, transformers)


def restore(model: nn.Module) -> None:
    """Undoes `accelerate`: every module has its class back, and every transformers configuration its attention.

    Args:
        model: the accelerated model, a copy of it, or a part of it. One that is not accelerated is left alone.
    """
    for module in model.modules():
        swap.restore(module)
    transformers = transformers_among(model.modules())
    if transformers is not None:
        transformers.undispatch_attention(model.modules())


def _take_on(module: nn.Module, unpad: bool) -> str | None:
    """Gives one module its fused class. None, or why a class that fastattn knows was left."""
    fused = swap.swapped_class(module.original if isinstance(module, swap.Swapped) else type(module))
    if fused is None:
        return None
    if fused.leaves_padding_out and not unpad:
        swap.restore(module)
        return "padding is computed, as unpad=False asks"
    if isinstance(module, swap.Swapped):
        return None
    if "forward" in module.__dict__:
        return "its forward has been replaced on the instance"
    reason = fused.unsupported(module)
    if reason is None:
        swap.take_on(module, fused)
    return reason


def transformers_among(modules: Iterable[nn.Module]) -> Any:
    """What turns transformers models' attention; None where no such model is among the modules.

    Transformers need not be installed: it is asked for only where it has been imported already.
    """
    loaded = sys.modules.get("transformers.modeling_utils")
    if loaded is None or not any(isinstance(module, loaded.PreTrainedModel) for module in modules):
        return None
    importlib.import_module("fastattn.integrations.transformers")
    return importlib.import_module("fastattn.integrations.transformers.dispatching")


def _report(modules: dict[str, nn.Module], refused: dict[str, str], transformers: Any) -> Report:
    replaced, left = [], []
    covered: set[nn.Module] = set()
    for name, module in modules.items():  # parents come before their parts
        kind = type(module)
        if isinstance(module, swap.Swapped):
            replaced.append(Replaced(name, module.original.__name__, module.does))
            covered.update(module.parts(module))
        elif name in refused:
            left.append(Left(name, kind.__name__, refused[name]))
        elif transformers is not None and transformers.dispatches(module):
            replaced.append(Replaced(name, kind.__name__, _ATTENTION))
        elif kind.__module__.startswith("fastattn.nn"):
            covered.update(module.children())
        elif module not in covered and next(module.parameters(recurse=False), None) is not None:
            left.append(Left(name, kind.__name__, _why_left(kind)))
    return Report(tuple(replaced), tuple(left))


def _why_left(kind: type[nn.Module]) -> str:
    if kind.__name__ in _LEFT:
        return _LEFT[kind.__name__]
    for ancestor in kind.__mro__[1:]:
        if swap.swapped_class(ancestor) is not None:
            return f"a subclass of {ancestor.__name__}, whose forward may be its own"
    return "fastattn knows no module of this class"

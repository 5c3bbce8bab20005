"""What models give: dicts whose items are attributes, too."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


class ModelOutput(dict[str, Tensor]):
    """Base of what a model gives: a dict of tensors with an attribute for each name its class declares, of which those that
    the call did not ask for are None and no items.

    A dict, since Hugging Face's Trainer looks for `output["loss"]` in one, and DistributedDataParallel for the tensors that
    need gradients. A dataclass and a pytree, too, for what takes outputs apart and makes them anew: FSDP and torch.export by
    their fields, Accelerate and DataParallel by their items.

    Args:
        values: tensors in the order in which the class declares them; or their items alone, a mapping or pairs.
        named: tensors by name. None for what is not there.

    Raises:
        TypeError: more values than the class declares, or another name.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __init_subclass__(cls) -> None:
        name = f"{cls.__module__}.{cls.__qualname__}"
        torch.export.register_dataclass(dataclass(init=False, repr=False, eq=False)(cls), serialized_type_name=name)

    def __init__(self, *values: Any, **named: Tensor | None) -> None:
        names = list(type(self).__dataclass_fields__)
        if len(values) == 1 and not isinstance(values[0], Tensor):
            named, values = dict(values[0]), ()
        unknown = [name for name in named if name not in names]
        if unknown or len(values) > len(names):
            given = ", ".join(unknown) or f"{len(values)} values"
            raise TypeError(f"{type(self).__name__} gets {given}; expected {', '.join(names)}")
        named = dict(zip(names, values)) | named
        super().__init__({name: tensor for name, tensor in named.items() if tensor is not None})

    # The items are all there is, so that item and attribute cannot differ.

    def __getattr__(self, name: str) -> Tensor | None:
        self._check_declared(name)
        return self.get(name)

    def __setattr__(self, name: str, value: Tensor | None) -> None:
        self._check_declared(name)
        if value is not None:
            self[name] = value
        else:
            self.pop(name, None)

    def _check_declared(self, name: str) -> None:
        if name not in type(self).__dataclass_fields__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

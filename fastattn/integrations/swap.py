"""A module takes on a fused class in place, and gives it back.

    type(module)  ->  class FusedBertOutput(DenseAddNorm, BertOutput)      the fused forward before the original's

Parameters, buffers, children, hooks and the `state_dict` stay the very objects they were: nothing but
`module.__class__` changes. The fused class derives from the original, so `isinstance` and every method that it does not
replace go on working, and no state is kept anywhere: a copy or an unpickled module is as accelerated, and as
restorable, as the one it came from.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

# The package that a class comes from, and the module whose import fills the table for it.
_TABLES = {"torch": "fastattn.integrations.torch_nn", "transformers": "fastattn.integrations.transformers"}


class Swapped:
    """What every class made here derives from.

    Attributes:
        original: the class that the module had.
        does: what the fused forward does, for the report.
        leaves_padding_out: whether the outputs at the padding differ from the original's.
    """

    original: ClassVar[type]
    does: ClassVar[str]
    leaves_padding_out: ClassVar[bool] = False

    forward: Callable[..., Any]  # the original's, after the fused one

    @classmethod
    def unsupported(cls, module: nn.Module) -> str | None:
        """Why this very module cannot take on the class, in one sentence; None if it can."""
        return None

    @classmethod
    def parts(cls, module: nn.Module) -> list[nn.Module]:
        """The children whose work the fused forward does itself."""
        return []

    @classmethod
    def prepare(cls, original: type[nn.Module]) -> dict[str, Any]:
        """Class attributes worked out once from the original class."""
        return {}

    def __reduce_ex__(self, protocol):
        # The class is made at run time, so a pickle names the original, from which it is made again.
        return (_new, (self.original,), *super().__reduce_ex__(protocol)[2:])


@dataclass(frozen=True)
class _Row:
    fused: type
    attributes: Mapping[str, Any]


_rows: dict[str, _Row] = {}
_made: dict[type, type[Swapped]] = {}


def register(original: str, fused: type, **attributes: Any) -> None:
    """Adds a row to the table of what is known.

    Args:
        original: the full name of a class ("torch.nn.modules.normalization.LayerNorm"); its subclasses are not meant.
        fused: a `Swapped` pattern, or a subclass of the original with the same attributes on its instances.
        attributes: class attributes of the result, such as `does`, or a pattern's `paths`.
    """
    _rows[original] = _Row(fused, attributes)


def swapped_class(original: type[nn.Module]) -> type[Swapped] | None:
    """The fused class that stands in for this one; None where no row of the table names it."""
    made = _made.get(original)
    if made is not None:
        return made
    table = _TABLES.get(original.__module__.partition(".")[0])
    if table is not None:
        importlib.import_module(table)
    row = _rows.get(f"{original.__module__}.{original.__qualname__}")
    if row is None:
        return None
    bases = (Swapped, row.fused) if issubclass(row.fused, original) else (row.fused, original)
    namespace = {"__module__": original.__module__, "original": original, **row.attributes}
    made = type(f"Fused{original.__name__}", bases, namespace)
    for name, value in made.prepare(original).items():
        setattr(made, name, value)
    _made[original] = made
    return made


def take_on(module: nn.Module, fused: type[Swapped]) -> None:
    """Gives a module its fused class."""
    module.__class__ = fused  # type: ignore[assignment]


def restore(module: nn.Module) -> None:
    """Gives a module its original class back; one that has it is left alone."""
    if isinstance(module, Swapped):
        module.__class__ = module.original


def _new(original: type) -> Swapped:
    made = swapped_class(original)
    if made is None:
        raise TypeError(
            f"{original.__module__}.{original.__qualname__} was accelerated when it was saved, but this version of "
            "fastattn does not know it; load it with the version that saved it, call fastattn.restore(model), and save "
            "it again"
        )
    return made.__new__(made)

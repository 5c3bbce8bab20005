"""Which attention modules are watched: `fastattn.inspect.record` says, and every attention module asks.

An attention module calls its op as `ops_of(self).attention(…)`. Where nobody records, that is `ops`, and the question costs
50 ns. For a watched module it is a stand-in that has the same functions and looks at their arguments (inspect/recorder.py).
"""

from typing import Any

import torch
from torch import nn

from . import ops

# A plain global, which torch.compile guards on: it compiles anew where somebody begins to record.
_active = False
_stand_ins: dict[nn.Module, Any] = {}


def ops_of(module: nn.Module) -> Any:
    """Where the module takes its attention from."""
    return _look_up(module) if _active else ops


def watched(module: nn.Module) -> bool:
    """Whether the module must call its attention itself: a layer around it may not run as one op."""
    return _active and _look_up(module) is not ops


@torch.compiler.disable  # what it finds may differ from one recording to the next
def _look_up(module: nn.Module) -> Any:
    return _stand_ins.get(module, ops)


def watch(module: nn.Module, stand_in: Any) -> None:
    """Makes this the module's `ops`."""
    global _active
    _stand_ins[module] = stand_in
    _active = True


def unwatch(module: nn.Module) -> None:
    """Gives the module `ops` back."""
    global _active
    del _stand_ins[module]
    _active = bool(_stand_ins)

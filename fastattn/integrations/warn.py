"""Warnings that are said once."""

import warnings

_said: set[str] = set()


def warn_once(message: str) -> None:
    """Warns with this very message the first time, and stays silent after that."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=3)

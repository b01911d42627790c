"""Plumb's library. The commands at the root import it; it imports none of them.

Rooms, each of which imports only from those before it: errors, console, paths | losses, distributed
| data | batching, runs | models | scoring | rollouts | training, reports | planning | settings |
api.

In a notebook: docs/api.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plumb.api import open_model, sample, score

__all__ = ["open_model", "sample", "score"]


def __getattr__(name: str) -> Any:
    """Import what notebooks use when they use it: `import plumb` itself imports nothing."""
    if name not in __all__:
        raise AttributeError(f"module 'plumb' has no attribute '{name}'")
    from plumb import api

    return vars(api)[name]

"""What was probably meant by an unknown name; free of torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["unknown"]


def unknown(kind: str, name: str, known: Iterable[str], otherwise: str = "") -> str:
    """Return a message about an unknown name, with the nearest known one.

    Args:
        kind: Of the thing that has the name, e.g. "model".
        name: The unknown name.
        known: All names that exist. One that begins with `name` is preferred to a similar one.
        otherwise: Text in brackets at the end, in place of the list of known names.
    """
    known = list(known)
    longer = [word for word in known if len(name) > 2 and word.startswith(name)]
    near = longer or difflib.get_close_matches(name, known, 1)
    hint = f": did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}{hint} ({otherwise or 'known: ' + ', '.join(known)})"

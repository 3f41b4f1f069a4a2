"""Damaged bytes, and changed JSON."""

import copy
import json
from random import Random
from typing import Any

from hypothesis import strategies as st


EDGE = 4096  # bytes at both ends of a file, where formats keep what is fragile


def damaged(content: bytes, draw: Random) -> bytes:
    """Cut off, or with bits flipped."""
    if not content or draw.random() < 0.3:
        return content[: _place(len(content), draw)]
    result = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 8, 64))):
        result[_place(len(content), draw)] ^= 1 << draw.randrange(8)
    return bytes(result)


def _place(size: int, draw: Random) -> int:
    """An index, as often in the first and in the last bytes as anywhere else."""
    if size == 0:
        return 0
    edge = min(EDGE, size)
    return draw.choice((draw.randrange(size), draw.randrange(edge), size - 1 - draw.randrange(edge)))


_TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            "",
            "\0",
            "\ud800",
            "../..",
            "/etc/passwd",
            "~",
            "owner/name",
            "{{ 1/0 }}",
            "<image>",
            "NaN",
            "float16",
            "a" * 5000,
        ]
    ),
)
_NUMBERS = st.one_of(
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from([-1, 0, 1, 2, 3, 10**6, 10**9, 2**31, 2**63, 10**400, 0.5]),
)
_VALUES = st.recursive(
    st.one_of(st.none(), _NUMBERS, _TEXTS),
    lambda values: st.one_of(st.lists(values, max_size=4), st.dictionaries(_TEXTS, values, max_size=4)),
    max_leaves=8,
)


@st.composite
def changed_json(draw: Any, values: Any) -> str:
    """JSON in which up to three values are replaced, removed, doubled or renamed. Shrinks to fewer and simpler changes."""
    changed = copy.deepcopy(values)
    for _ in range(draw(st.integers(1, 3))):
        holder, key = changed, None
        while True:
            keys = sorted(holder) if isinstance(holder, dict) else range(len(holder))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if not isinstance(holder[key], (dict, list)) or draw(st.booleans()):
                break
            holder = holder[key]
        kind = draw(st.sampled_from(["replace", "remove", "wrap", "rename"]))
        if key is None or key not in (holder if isinstance(holder, dict) else range(len(holder))):
            continue
        if kind == "replace":
            holder[key] = draw(_VALUES)
        elif kind == "wrap":
            holder[key] = [copy.deepcopy(holder[key])] * draw(st.integers(1, 3))
        elif kind == "rename" and isinstance(holder, dict):
            holder[draw(_TEXTS)] = holder.pop(key)
        else:
            del holder[key]
    return json.dumps(changed)

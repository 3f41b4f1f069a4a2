"""Write sizes and speeds as people read them."""

from __future__ import annotations


_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def readable_size(size: float) -> str:
    """Return a number of bytes with three digits and a decimal unit, such as "3.42 kB", "547 kB" or "4.70 GB"."""
    index = 0
    while index < len(_UNITS) - 1 and size >= 999.5:
        size, index = size / 1000, index + 1
    if index == 0:
        return f"{size:.0f} {_UNITS[0]}"
    decimals = 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{size:,.{decimals}f} {_UNITS[index]}"


def readable_rate(rate: float) -> str:
    """Return a number per second with as many digits as a measurement has: "7.63", "38.2" or "2,506"."""
    decimals = 2 if rate < 9.995 else 1 if rate < 99.95 else 0
    return f"{rate:,.{decimals}f}"

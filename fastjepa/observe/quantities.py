"""Plain numbers in words a person reads: parameters, operations, bytes, times."""

import math


def count(parameters: int) -> str:
    """`304.7 M (304,680,960)`."""
    return f"{parameters / 1e6:,.1f} M ({parameters:,})"


def scaled(value: float, unit: str) -> str:
    """`value` with the prefix that leaves 1 to 999 before the point: `228 TFLOP`."""
    prefixes = ("", "k", "M", "G", "T", "P", "E", "Z")
    power = min(len(prefixes) - 1, int(math.log10(value) // 3)) if value >= 1.0 else 0
    return f"{value / 1000.0**power:.3g} {prefixes[power]}{unit}"


def binary_size(size: float) -> str:
    """Bytes in GiB, or MiB below one of them."""
    gib = size / 2**30
    return f"{gib:,.2f} GiB" if gib >= 1.0 else f"{size / 2**20:,.1f} MiB"


def seconds(value: float) -> str:
    """`1.25 s`, or milliseconds below one second."""
    return f"{value:,.3g} s" if value >= 1.0 else f"{value * 1e3:,.3g} ms"

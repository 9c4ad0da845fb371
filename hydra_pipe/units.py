"""Conversion of bytes and seconds to words and back, and the memory of this process."""

import re
import resource
import sys
from pathlib import Path

from hydra_pipe.errors import UsageError

_FACTORS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SECONDS = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> int:
    """Return the bytes in `text`, such as "4GiB", "512 MB" or "1000000".

    Raises:
        UsageError: `text` is not a number with one of the units B, KB, MB, GB, TB, KiB, MiB,
            GiB, TiB.
    """
    match = _SIZE.fullmatch(text)
    unit = match.group(2).upper() if match else None
    if match is None or unit not in _FACTORS:
        raise UsageError(
            f"{text!r} is not a size: write a number and a unit, such as 4GiB or 512MiB"
        )
    return int(float(match.group(1)) * _FACTORS[unit])


def format_bytes(n_bytes: float) -> str:
    """Return `n_bytes` with a binary unit and three significant digits: 3221225472 is "3 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n_bytes) < 1024:
            whole = unit == "B" or abs(n_bytes) >= 99.95
            return f"{n_bytes:.0f} {unit}" if whole else f"{n_bytes:.3g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.3g} TiB"


def format_seconds(seconds: float) -> str:
    """Return `seconds` in words: 0.42 is "0.4 s", 4000 is "1 h 06 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min {int(seconds % 60):02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def parse_seconds(text: str) -> float | None:
    """Return the seconds in `text`, such as "90s", "10min" or "2h"; None without such a unit."""
    match = _SIZE.fullmatch(text)
    factor = _SECONDS.get(match.group(2).lower()) if match else None
    return float(match.group(1)) * factor if match and factor else None


def resident_bytes() -> int:
    """Return the memory of this process now, or its peak so far if the system does not tell."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    # macOS counts bytes, other systems KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )

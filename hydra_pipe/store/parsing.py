"""What the JSON of a run says, which a stranger may have written: parsed within bounds, and taken for nothing but what it is."""

import json
import re
from pathlib import Path
from typing import Any, TypeGuard

from hydra_pipe.store.files import read_file

# Labels with their names take tens of megabytes at most, and everything else far less.
MOST_JSON_BYTES = 256 * 2**20
# The writers nest eight deep. What is parsed is also written again, by code that goes one call deeper at each level.
MOST_DEPTH = 64
MOST_COUNT = 2**63 - 1
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


def read_json(path: Path) -> Any:
    """The JSON in a file. Raises: ValueError: it is none, or nested too deeply; OSError: it cannot be read, or is too large."""
    content = read_file(path, MOST_JSON_BYTES)
    too_deep = f"nested more than {MOST_DEPTH} deep"
    try:
        data = json.loads(content)
    except RecursionError:
        raise ValueError(too_deep) from None
    if content.count(b"[") + content.count(b"{") > MOST_DEPTH and not _is_shallow(data):
        raise ValueError(too_deep)
    if rb"\ud" in content.lower():
        # half of a pair is no text, and can be neither printed nor written; this raises for it
        json.dumps(data, ensure_ascii=False).encode()
    return data


def _is_shallow(data: Any) -> bool:
    level = [data]
    for _ in range(MOST_DEPTH + 1):
        level = [v for x in level if isinstance(x, dict | list) for v in (x.values() if isinstance(x, dict) else x)]
        if not level:
            return True
    return False


def is_count(value: Any, least: int = 0) -> TypeGuard[int]:
    """Whether JSON says a whole number of `least` or more that fits an array's shape."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST_COUNT


def is_plain(name: str) -> bool:
    """Whether a name can be that of a file, whatever stands beside it: letters, digits, "-" and "_"."""
    return _PLAIN.fullmatch(name) is not None

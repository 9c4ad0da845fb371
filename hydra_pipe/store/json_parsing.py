"""Parsing of the JSON of a run, which a stranger may have written.

Sizes and depths are bounded, and every value is checked before it is used.
"""

import json
import re
from pathlib import Path
from typing import Any, TypeGuard

from hydra_pipe.store.files import read_file

# Labels with their names take tens of megabytes at most, and everything else far less.
MOST_JSON_BYTES = 256 * 2**20
# The writers nest eight deep. Parsed data is also written again, by code that goes one call
# deeper at each level.
MOST_DEPTH = 64
MOST_COUNT = 2**63 - 1
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


def read_json(path: Path) -> Any:
    """Return the JSON in a file.

    Raises:
        ValueError: the content is not JSON, or nested too deeply.
        OSError: the file cannot be read, or is too large.
    """
    content = read_file(path, MOST_JSON_BYTES)
    too_deep = f"nested more than {MOST_DEPTH} deep"
    try:
        data = json.loads(content)
    except RecursionError:
        raise ValueError(too_deep) from None
    if content.count(b"[") + content.count(b"{") > MOST_DEPTH and not _is_shallow(data):
        raise ValueError(too_deep)
    if rb"\ud" in content.lower():
        # Half of a surrogate pair is no text, and can be neither printed nor written. The
        # encoding raises an error for it.
        json.dumps(data, ensure_ascii=False).encode()
    return data


def _is_shallow(data: Any) -> bool:
    level = [data]
    for _ in range(MOST_DEPTH + 1):
        level = [
            v
            for x in level
            if isinstance(x, dict | list)
            for v in (x.values() if isinstance(x, dict) else x)
        ]
        if not level:
            return True
    return False


def is_count(value: Any, least: int = 0) -> TypeGuard[int]:
    """Tell whether a value from JSON is a whole number, `least` or more, that fits a shape."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST_COUNT


def is_plain(name: str) -> bool:
    """Tell whether a file may have this name: letters, digits, "-" and "_", in any context."""
    return _PLAIN.fullmatch(name) is not None

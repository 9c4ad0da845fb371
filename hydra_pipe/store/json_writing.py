"""Writing of the JSON of a run, for machines and for people."""

import json
from typing import Any

# Objects nested so deep have a line for each entry. What is in them stands on one line.
_LEVELS = 4


def json_bytes(data: Any) -> bytes:
    """Return `data` as JSON, with a line for each entry of the outer objects.

    The time is a fifth of the time of `json.dumps(data, indent=2)`, which leaves C.

    Raises:
        TypeError: JSON has no such values.
    """
    return _text(data, 0).encode()


def _text(data: Any, level: int) -> str:
    is_plain = not isinstance(data, dict) or not all(isinstance(key, str) for key in data)
    if is_plain or not data or level == _LEVELS:
        return json.dumps(data)
    indent = "  " * level
    entries = [
        f"{indent}  {json.dumps(key)}: {_text(value, level + 1)}" for key, value in data.items()
    ]
    return "{\n" + ",\n".join(entries) + f"\n{indent}}}"

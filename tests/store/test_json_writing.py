"""JSON that is written has a line for each entry, and is read as what it was."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_pipe.store.json_writing import json_bytes

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner)
)


@given(TREES)
def test_what_is_written_is_what_the_json_module_writes(data: object) -> None:
    assert json.loads(json_bytes(data)) == json.loads(json.dumps(data))


def test_each_entry_of_the_outer_objects_has_a_line() -> None:
    data = {"shape": [3, 4], "attributes": {"kind": "rows", "none": {}}}
    assert json_bytes(data).decode().splitlines() == [
        "{",
        '  "shape": [3, 4],',
        '  "attributes": {',
        '    "kind": "rows",',
        '    "none": {}',
        "  }",
        "}",
    ]


def test_what_json_lacks_is_refused() -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        json_bytes({"a": {"b": object()}})

"""Files so small that a recording of a moment has several of each array."""

from collections.abc import Callable

from hydra_pipe.plan import chunking
from hydra_pipe.recording import row_buffer
from hydra_pipe.store.data import gradients_writer


def make_files_small(put: Callable[[object, str, object], None]) -> None:
    """A shard of rows ends every second step of 8 rows, one of steps every fourth, and every second
    step is written.
    """
    put(chunking, "MAX_SHARD_ROWS", 16)
    put(gradients_writer, "STEP_SHARD_ROWS", 4)
    put(row_buffer, "BUFFER_STEPS", 2)

"""Time that bytes and operations take, and memory that a process takes before any work."""

from dataclasses import dataclass

# Python with NumPy and Dask loaded, the codecs' own buffers, and the memory that the allocator
# keeps: measured, rounded up.
BASE_BYTES = 160 * 2**20
# The same without Python and its modules, for a process that already holds other things
# (torch, a data set).
OVERHEAD_BYTES = 96 * 2**20


@dataclass(frozen=True)
class Costs:
    """Picoseconds of one worker, measured (benchmarks/RESULTS.md). Only their ratios matter.

    Args:
        fetched_byte: time to read a stored byte from a fast disk, which all workers share.
        decoded_byte: time to copy a stored byte from the page cache and decode it.
        converted_value: time to convert a value to float32 and multiply it by its weight.
        folded_value: time to add a value to the sum of its sample.
        operation: time of one operation of a float32 matrix product.
        touched_byte: time of the first write to a byte of a worker's sums. It is less where the
            system has memory at hand, and more in a virtual machine that must ask for memory.
        moved_byte: time to move a byte from one process to another.
    """

    fetched_byte: int = 300
    decoded_byte: int = 600
    converted_value: int = 200
    folded_value: int = 250
    operation: int = 11
    touched_byte: int = 300
    moved_byte: int = 2000


COSTS = Costs()


def base_bytes(resident: int) -> int:
    """Return the memory of a process before anything that a plan counts.

    Args:
        resident: bytes that the process already takes.
    """
    return max(BASE_BYTES, resident + OVERHEAD_BYTES)


def suggested(n_bytes: int) -> str:
    """Return a budget as the option --memory takes it."""
    return f"{-(-n_bytes // 2**20)}MiB"

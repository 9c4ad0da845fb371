"""The time that bytes and operations take, and the memory that a process takes before any of its work."""

from dataclasses import dataclass

# Python with NumPy and Dask loaded, the codecs' own buffers, and what the allocator keeps: measured, rounded up.
BASE_BYTES = 160 * 2**20
# The same without Python and its modules, for a process that holds other things already (torch, a data set).
OVERHEAD_BYTES = 96 * 2**20


@dataclass(frozen=True)
class Costs:
    """Picoseconds that one worker takes, measured (benchmarks/RESULTS.md); only their ratios matter.

    Args:
        fetched_byte: to read a stored byte from the disk, which all workers share: a fast one.
        decoded_byte: to copy a stored byte from the page cache, and decode it.
        converted_value: to float32, times its weight.
        folded_value: to add to its sample's sum.
        operation: of a float32 matrix product.
        touched_byte: of the sums of a worker, when they are first written to: less where the system has such memory at hand, more
            in a virtual machine that must ask for it.
        moved_byte: from one process to another.
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
    """Memory of a process that takes `resident` bytes already, but for what a plan counts."""
    return max(BASE_BYTES, resident + OVERHEAD_BYTES)


def suggested(n_bytes: int) -> str:
    """A budget, as an option takes it."""
    return f"{-(-n_bytes // 2**20)}MiB"

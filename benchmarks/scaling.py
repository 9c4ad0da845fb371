"""What reductions of any size would take, by the planner alone: nothing is read or computed.

    python benchmarks/scaling.py [--samples 1000000] [--epochs 100] [--features 4096] [--tests
    10000] [--disk 1.0]

For machines of several sizes: the order of work, passes over the store, bytes, operations, and
hours. Time is the larger of what the planner's costs (`plan.costs.COSTS`, measured on one core of
the machine in RESULTS.md) come to and of what reading takes at `--disk` GB a second, for each
machine. `docs/scaling.md` has the table and what it means.
"""

import argparse
from dataclasses import dataclass

from hydra_pipe.errors import BudgetError
from hydra_pipe.plan.chunking import store_geometry
from hydra_pipe.plan.sums import SumInput, SumPlan, plan_sums
from hydra_pipe.units import format_bytes, format_seconds

GIB = 2**30
BATCH = 1024


@dataclass(frozen=True)
class Machines:
    """What a reduction would run on.

    Args:
        title: in words.
        workers: threads of one process, or processes of one thread each.
        memory_bytes: of the process, or of each.
        processes: which of the two.
        disks: machines that read at once.
    """

    title: str
    workers: int
    memory_bytes: int
    processes: bool = False
    disks: int = 1


MACHINES = [
    Machines("2 cores, 4 GiB", 2, 4 * GIB),
    Machines("2 cores, 24 GiB", 2, 24 * GIB),
    Machines("16 cores, 64 GiB", 16, 64 * GIB),
    Machines("16 cores, 256 GiB", 16, 256 * GIB),
    Machines("10 x 16 processes of 8 GiB", 160, 8 * GIB, processes=True, disks=10),
]


def reduction(
    given: argparse.Namespace, machines: Machines, item_bytes: int, folding: int
) -> tuple[SumInput, SumPlan]:
    geometry = store_geometry(given.features, item_bytes)
    what = SumInput(
        n_rows=given.samples * given.epochs,
        n_features=given.features,
        n_folding=folding,
        n_samples=given.samples,
        n_tests=given.tests,
        n_columns=given.tests,
        n_steps=given.samples * given.epochs // BATCH,
        n_blocks=20,
        n_groups=1,
        item_bytes=item_bytes,
        test_item_bytes=2,
        shard_rows=geometry.shard_rows,
        chunk_rows=geometry.chunk_rows,
        chunk_features=geometry.chunk_features,
        memory_bytes=machines.memory_bytes,
        workers=machines.workers,
        processes=machines.processes,
    )
    return what, plan_sums(what, None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=10**6)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--tests", type=int, default=10**4)
    parser.add_argument("--disk", type=float, default=1.0, help="GB a second that a machine reads")
    given = parser.parse_args()
    rows = given.samples * given.epochs
    print(
        f"{given.samples:,} samples x {given.epochs} epochs = {rows:,} rows of "
        f"{given.features:,} features, {given.tests:,} test "
        f"samples: {format_bytes(rows * given.features * 2)} as float16, "
        f"{format_bytes(rows * given.features)} as int8; relevance "
        f"{format_bytes(given.samples * given.tests * 4)}; kept hypergradients "
        f"{format_bytes(given.samples * given.features * 4)}"
    )
    for what, item_bytes, folding in (
        ("projected or dense, float16", 2, given.features),
        ("projected or dense, int8", 1, given.features),
        ("factored, float16", 2, 0),
    ):
        print(
            f"\n{what}\n| machines | order | passes | read | between processes | operations | "
            "peak | time |\n| --- " + "| --- " * 7 + "|"
        )
        for machines in MACHINES:
            try:
                _, plan = reduction(given, machines, item_bytes, folding)
            except BudgetError as error:
                print(f"| {machines.title} | {error} |")
                continue
            computing = plan.picoseconds / 1e12 / plan.workers
            reading = plan.read_bytes / (given.disk * 1e9 * machines.disks)
            workers = f"{plan.workers} worker{'s' if plan.workers > 1 else ''}"
            bound = "disk" if reading > computing else "processors"
            print(
                f"| {machines.title} | {plan.order}, {workers} | {plan.passes} | "
                f"{format_bytes(plan.read_bytes)} | {format_bytes(plan.moved_bytes)} | "
                f"{plan.operations:.1e} | "
                f"{format_bytes(plan.peak_bytes)} | {format_seconds(max(computing, reading))} "
                f"({bound}) |"
            )


if __name__ == "__main__":
    main()

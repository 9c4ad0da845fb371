"""The columns of a layout as a reduction reads them: dense runs, and factored weights with bias."""

from dataclasses import dataclass

from hydra_pipe.plan.layout import Block, ColumnRange, Layout


@dataclass(frozen=True)
class DenseSegment:
    """Neighbouring dense or sketched blocks: one matrix product takes them all.

    Args:
        columns: columns of the whole run.
        blocks: index and columns of each block in it.
    """

    columns: ColumnRange
    blocks: tuple[tuple[int, ColumnRange], ...]

    @property
    def runs(self) -> tuple[ColumnRange, ...]:
        """Every run of columns of the segment."""
        return (self.columns,)

    @property
    def last_column(self) -> int:
        return self.columns[1]


@dataclass(frozen=True)
class FactoredSegment:
    """A factored weight, and the bias that shares its output factor.

    Args:
        outputs: columns of the output-gradient factor.
        inputs: columns of the input factor.
        weight: index of the weight's block.
        bias: index of the bias's block, or None.
    """

    outputs: ColumnRange
    inputs: ColumnRange
    weight: int
    bias: int | None

    @property
    def runs(self) -> tuple[ColumnRange, ...]:
        """Every run of columns of the segment."""
        return (self.outputs, self.inputs)

    @property
    def last_column(self) -> int:
        return max(self.outputs[1], self.inputs[1])


Segment = DenseSegment | FactoredSegment


def overlap(columns: ColumnRange, first: int, last: int) -> ColumnRange | None:
    """Return the part of `columns` inside [first, last). None if there is none."""
    low, high = max(columns[0], first), min(columns[1], last)
    return (low, high) if low < high else None


def has_part(segment: Segment, first: int, last: int) -> bool:
    """Tell whether a segment has columns in [first, last)."""
    return any(overlap(run, first, last) for run in segment.runs)


def segments_of(layout: Layout) -> list[Segment]:
    """Return segments that hold every block of `layout` once, ordered by their last column."""
    factored: list[Segment] = []
    dense: list[tuple[int, Block]] = []
    biases = {
        b.columns: i
        for i, b in enumerate(layout.blocks)
        if b.encoding == "factored" and b.inputs is None
    }
    for index, block in enumerate(layout.blocks):
        if block.inputs is not None:
            factored.append(
                FactoredSegment(block.columns, block.inputs, index, biases.get(block.columns))
            )
        elif block.encoding != "factored":
            dense.append((index, block))
    runs: list[list[tuple[int, ColumnRange]]] = []
    for index, block in sorted(dense, key=lambda entry: entry[1].columns):
        if runs and runs[-1][-1][1][1] == block.columns[0]:
            runs[-1].append((index, block.columns))
        else:
            runs.append([(index, block.columns)])
    joined: list[Segment] = [
        DenseSegment((run[0][1][0], run[-1][1][1]), tuple(run)) for run in runs
    ]
    return sorted([*factored, *joined], key=lambda segment: segment.last_column)


def dense_segments(layout: Layout) -> list[DenseSegment]:
    """Return the dense segments of `layout`: only these can be summed by sample."""
    return [segment for segment in segments_of(layout) if isinstance(segment, DenseSegment)]

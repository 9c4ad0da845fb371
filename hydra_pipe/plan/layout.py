"""Block directory: columns and encoding of each parameter in the gradient array."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any, Literal, get_args

from hydra_pipe.errors import BudgetError, StoreError, shown
from hydra_pipe.maths.sketch_runs import run_length

Encoding = Literal["dense", "factored", "grids", "kron", "sketch"]
EncodingChoice = Literal["auto", "exact", "projected"]
ENCODING_CHOICES: tuple[EncodingChoice, ...] = get_args(EncodingChoice)

# A row of more elements is too large to be written out for every sample of a batch before the
# projection.
LARGEST_WRITTEN_OUT = 2**20

# Outputs, and inputs, of a grid of coordinates where the sides allow it. Smaller grids are a little
# nearer, larger ones need less work (benchmarks/RESULTS.md).
GRID_SIDE = 4

ColumnRange = tuple[int, int]  # first and one past the last
_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Block:
    """One trainable parameter and the columns of its rows.

    Args:
        name: name in the model's `named_parameters`.
        shape: shape of the parameter.
        group: index of its parameter group in the optimiser.
        encoding: encoding of the rows (docs/format.md).
        columns: columns of the row itself (dense, grids, kron, sketch), or of the output-gradient
            factor (factored).
        inputs: columns of the input factor of a factored weight. None for a factored bias: its
            input is 1, and its `columns` are those of its weight. None for the other encodings.
        kron: (O, I, k_out, k_in) of a block in the encoding kron: the size of each side before and
            after projection. None for the others.
        grids: (O, I, g_o, g_i) of a block in the encoding grids: the size of each side, of the
            block and of a grid. None for the others.
    """

    name: str
    shape: tuple[int, ...]
    group: int
    encoding: Encoding
    columns: ColumnRange
    inputs: ColumnRange | None = None
    kron: tuple[int, int, int, int] | None = None
    grids: tuple[int, int, int, int] | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def exact(self) -> bool:
        """True if the encoding loses nothing but the dtype's rounding."""
        return self.encoding in ("dense", "factored")

    @property
    def variance(self) -> float:
        """Bound on the variance of the projected <x, y>, over |x|^2 |y|^2.

        It is 0 for exact encodings. The formulas are in `hydra_pipe.maths.sketch` and
        `hydra_pipe.maths.kron`. Grids have no such bound: they count as a sketch, to which they
        are equal for rows with a preconditioner (`hydra_pipe.maths.grids`).
        """
        if self.encoding in ("sketch", "grids"):
            return 2 * 1.02 / (self.columns[1] - self.columns[0])
        return _kron_error(*self.kron) - 1.0 if self.kron else 0.0


@dataclass(frozen=True)
class Layout:
    """Block directory: every recorded parameter, in the order of the model's parameters.

    Args:
        blocks: one block for each trainable parameter.
        n_features: number of columns in all.
        seed: seed of the random projections.
    """

    blocks: tuple[Block, ...]
    n_features: int
    seed: int

    @property
    def widths(self) -> list[int]:
        """Number of features of each block with factored blocks multiplied out."""
        return [
            (block.columns[1] - block.columns[0])
            * (1 if block.inputs is None else block.inputs[1] - block.inputs[0])
            for block in self.blocks
        ]

    @property
    def whole_width(self) -> int:
        """Number of features with factored blocks multiplied out."""
        return sum(self.widths)

    def to_json(self) -> dict[str, Any]:
        return {
            "n_features": self.n_features,
            "seed": self.seed,
            "blocks": [asdict(block) for block in self.blocks],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Layout":
        """Read a block directory.

        Raises:
            StoreError: `data` is no block directory, a column lies outside the array, or a column
                is not of exactly one block.
        """
        try:
            n_features = _whole(data["n_features"], 1)
            blocks = tuple(_block_from_json(entry, n_features) for entry in data["blocks"])
            _check_columns(blocks, n_features)
            return Layout(blocks, n_features, _whole(data["seed"], None))
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"the block directory is damaged: {shown(error)}") from error


def factored_part(layout: Layout) -> tuple[Layout, list[int], list[int]]:
    """Return the factored blocks of `layout` alone, with their columns side by side.

    Returns:
        The layout of the factored blocks, the numbers of their columns in `layout`, and the numbers
        of their blocks in `layout`.
    """
    chosen = [index for index, block in enumerate(layout.blocks) if block.encoding == "factored"]
    runs = {
        run
        for index in chosen
        for run in (layout.blocks[index].columns, layout.blocks[index].inputs)
        if run is not None
    }
    columns: list[int] = []
    places: dict[ColumnRange, ColumnRange] = {}
    for first, last in sorted(runs):
        places[first, last] = (len(columns), len(columns) + last - first)
        columns += range(first, last)
    blocks = tuple(
        replace(
            block,
            columns=places[block.columns],
            inputs=None if block.inputs is None else places[block.inputs],
        )
        for block in (layout.blocks[index] for index in chosen)
    )
    return Layout(blocks, len(columns), layout.seed), columns, chosen


def _block_from_json(data: Mapping[str, Any], n_features: int) -> Block:
    name, encoding = data["name"], data["encoding"]
    if not isinstance(name, str):
        raise TypeError(f"a block called {shown(name)}")

    def columns(key: str) -> ColumnRange:
        first, last = (_whole(c, 0) for c in data[key])
        if not first < last <= n_features:
            raise ValueError(
                f"columns {first} to {last} of block {name} lie outside 0 to {n_features}"
            )
        return first, last

    if encoding not in get_args(Encoding):
        raise ValueError(f"unknown encoding {shown(encoding)} of block {name}")
    block = Block(
        name=name,
        shape=tuple(_whole(n, 1) for n in data["shape"]),
        group=_whole(data["group"], 0),
        encoding=encoding,
        columns=columns("columns"),
        inputs=columns("inputs") if data["inputs"] is not None else None,
        kron=_sides(data, "kron"),
        grids=_sides(data, "grids"),
    )
    numel = 1
    for n in block.shape:  # not `numel`: a product of many large numbers takes forever
        numel = _whole(numel * n, 1)
    if (
        (block.kron is None) == (encoding == "kron")
        or (block.grids is None) == (encoding == "grids")
        or (block.inputs is not None and encoding != "factored")
    ):
        raise ValueError(
            f"block {name} is {encoding}, with inputs {data['inputs']}, kron {data['kron']} and "
            f"grids {data['grids']}"
        )
    return block


def _sides(data: Mapping[str, Any], key: str) -> tuple[int, int, int, int] | None:
    if data[key] is None:
        return None
    outputs, inputs, of_outputs, of_inputs = (_whole(n, 1) for n in data[key])
    return outputs, inputs, of_outputs, of_inputs


def _check_columns(blocks: Sequence[Block], n_features: int) -> None:
    """Check that every column is of one block. A factored bias shares the columns of its weight.

    Raises:
        ValueError: a column is of no block or of two, or a bias has other columns than a weight.
    """
    biases = [
        block.columns for block in blocks if block.encoding == "factored" and block.inputs is None
    ]
    owned = [
        run
        for block in blocks
        if block.encoding != "factored" or block.inputs
        for run in (block.columns, block.inputs)
        if run
    ]
    if len(set(biases)) < len(biases) or not {
        block.columns for block in blocks if block.inputs is not None
    }.issuperset(biases):
        raise ValueError(
            "the columns of a factored bias are no weight's, or two biases have the same"
        )
    end = 0
    for first, last in sorted(owned):
        if first != end:
            raise ValueError(
                f"columns {min(first, end)} to {max(first, end)} belong to "
                f"{'no block' if first > end else 'two blocks'}"
            )
        end = last
    if end != n_features:
        raise ValueError(f"columns {end} to {n_features} belong to no block")


def _whole(value: Any, least: int | None) -> int:
    """Return `value` if it is a whole number that fits 64 bits, and `least` or more.

    Raises:
        ValueError: it is not.
    """
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or not (-_LARGEST if least is None else least) <= value <= _LARGEST
    ):
        raise ValueError(f"{shown(value)} is not a size or an index")
    return value


@dataclass(frozen=True)
class Parameter:
    """Facts about a parameter from which its layout is chosen.

    Args:
        name: name of the parameter.
        shape: shape of the parameter.
        group: index of its parameter group.
        factors: (outputs, inputs) if each sample's gradient is one outer product, else None.
        sides: (outputs, inputs) if each sample's gradient is a sum of outer products, over one
            position or many, else None.
        is_table: True if a sample's gradient has few lines, those of its tokens.
        bias_of: name of the weight whose output factor is this parameter's gradient, else None.
    """

    name: str
    shape: tuple[int, ...]
    group: int
    factors: tuple[int, int] | None = None
    bias_of: str | None = None
    sides: tuple[int, int] | None = None
    is_table: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def exact_width(self) -> int:
        """Number of columns of the narrowest lossless encoding."""
        return min(self.numel, sum(self.factors)) if self.factors else self.numel


def choose_layout(
    parameters: Sequence[Parameter],
    choice: EncodingChoice,
    dim: int,
    seed: int,
    *,
    preconditioned: bool = False,
) -> Layout:
    """Give every parameter an encoding and columns.

    `exact` takes the narrowest lossless encoding of each parameter. `projected` makes every
    parameter dense or projected. The parameters share `dim` columns in proportion to the square
    root of their sizes. `auto` takes the narrowest lossless encoding if it is no wider than
    about twice the parameter's share of the columns that are left (see `_widths`). It projects
    the other parameters to their shares.

    A sketch projects a block more exactly than `kron` for as many columns, but needs the whole
    row. So `kron` projects the sums of outer products that are too large to be written out. Under
    a preconditioner, grids of coordinates take the place of both, because they know its elements.
    Grids of a table of tokens would miss most lines that a sample has, so a sketch projects it.

    Args:
        parameters: parameters in the order of the model.
        choice: "auto", "exact" or "projected".
        dim: budget in columns, not used by `exact`.
        seed: seed of the random projections.
        preconditioned: True if rows will be multiplied by an elementwise preconditioner.

    Raises:
        BudgetError: there are fewer columns than parameters to hold.
    """
    if choice != "exact" and dim < len(parameters):
        raise BudgetError(
            f"--dim {dim} is less than one column for each of the {len(parameters)} parameters: "
            f"raise it to {len(parameters)} or more"
        )
    biases, widths = _shared_columns(parameters, choice, dim)
    shared = {bias.name for bias in biases.values()}
    placed: dict[str, Block] = {}
    first = 0
    for parameter in parameters:
        if parameter.name in shared:
            continue
        block = _placed(
            parameter, first, widths[parameter.name], choice, preconditioned=preconditioned
        )
        placed[block.name] = block
        if (bias := biases.get(block.name)) is not None:
            placed[bias.name] = Block(
                bias.name, bias.shape, bias.group, block.encoding, block.columns
            )
        first = (block.inputs or block.columns)[1]
    return Layout(tuple(placed[p.name] for p in parameters), first, seed)


def _shared_columns(
    parameters: Sequence[Parameter], choice: EncodingChoice, dim: int
) -> tuple[dict[str, Parameter], dict[str, int]]:
    """Return the biases that share the factor of their weight, and the widths of all others.

    Returns:
        Bias by the name of its weight, and columns by the name of the parameter.
    """
    biases = {
        p.bias_of: p
        for p in parameters
        if choice != "projected" and p.bias_of and _prefers_factors(_by_name(p.bias_of, parameters))
    }
    while True:
        shared = {bias.name for bias in biases.values()}
        widths = _widths([p for p in parameters if p.name not in shared], choice, dim)
        projected = [w for w in biases if widths[w] != _by_name(w, parameters).exact_width]
        if not projected:
            return biases, widths
        # the bias of a projected weight has no factor to share: it takes columns of the same budget
        for weight in projected:
            del biases[weight]


def _placed(
    parameter: Parameter, first: int, width: int, choice: EncodingChoice, *, preconditioned: bool
) -> Block:
    """Return the block of a parameter that gets `width` columns or fewer, from column `first`."""
    name, shape, group = parameter.name, parameter.shape, parameter.group
    factored = choice != "projected" and _prefers_factors(parameter)
    if factored and width == parameter.exact_width:
        assert parameter.factors is not None
        middle = first + parameter.factors[0]
        return Block(name, shape, group, "factored", (first, middle), (middle, first + width))
    if width == parameter.numel:
        return Block(name, shape, group, "dense", (first, first + width))
    if preconditioned and not parameter.is_table:
        outputs, inputs = parameter.sides or (parameter.numel, 1)
        grid = min(GRID_SIDE, outputs, width), min(GRID_SIDE, inputs, max(1, width // GRID_SIDE))
        width -= width % (grid[0] * grid[1])
        return Block(
            name, shape, group, "grids", (first, first + width), grids=(outputs, inputs, *grid)
        )
    if parameter.sides is not None and parameter.numel > LARGEST_WRITTEN_OUT:
        k_out, k_in = choose_sides(*parameter.sides, width)
        columns = (first, first + k_out * k_in)
        return Block(name, shape, group, "kron", columns, kron=(*parameter.sides, k_out, k_in))
    # one column less makes the runs of the sketch longer
    shorter = width > 1 and run_length(parameter.numel, width - 1) > run_length(
        parameter.numel, width
    )
    return Block(name, shape, group, "sketch", (first, first + width - shorter))


def choose_sides(outputs: int, inputs: int, columns: int) -> tuple[int, int]:
    """Return the (k_out, k_in) with the least bound on the variance (`hydra_pipe.maths.kron`).

    Their product is at most `columns`. The smallest k_out wins a tie.

    Args:
        outputs, inputs: O and I.
        columns: number of columns, at least 1.
    """
    pairs = (
        (k_out, min(inputs, columns // k_out)) for k_out in range(1, min(outputs, columns) + 1)
    )
    return min(pairs, key=lambda pair: _kron_error(outputs, inputs, *pair))


def _kron_error(outputs: int, inputs: int, k_out: int, k_in: int) -> float:
    """Return one plus the bound on the variance of the encoding kron."""

    def of_side(k: int, size: int) -> float:
        return 1.0 if k == size else 1.0 + 2.0 / k

    return of_side(k_out, outputs) * of_side(k_in, inputs)


def _prefers_factors(parameter: Parameter) -> bool:
    return parameter.factors is not None and sum(parameter.factors) < parameter.numel


def _by_name(name: str, parameters: Sequence[Parameter]) -> Parameter:
    """Return the parameter called `name`, which must be there."""
    return next(p for p in parameters if p.name == name)


def _widths(parameters: Sequence[Parameter], choice: EncodingChoice, dim: int) -> dict[str, int]:
    """Return the columns of each parameter, by water filling.

    Parameters come in the order of lossless columns over share, the smallest first. Each one is
    given its share of the columns that are left, or its lossless width if that is worth it.

    A block of energy E (the norm of its rows) projected to k columns adds E^2 / k to the variance
    of relevance. So k in proportion to E is best. Blocks of energies E_j in K columns then add
    (sum E_j)^2 / K. E is not known before training. The root of the size stands for it.

    A block that is exact in w columns adds nothing and leaves K - w columns to the others. It is
    worth it if (sum E_j - E)^2 / (K - w) <= (sum E_j)^2 / K. This allows up to twice the share for
    one block of many, and less for one block of few.
    """
    if choice == "exact":
        return {p.name: p.exact_width for p in parameters}

    def wanted(p: Parameter) -> int:
        return p.numel if choice == "projected" else p.exact_width

    def worth_it(width: int, claim: float) -> bool:
        if choice == "projected":
            return width <= int(columns_left * claim / claims_left)
        return bool(
            (claims_left - claim) ** 2 * columns_left <= claims_left**2 * (columns_left - width)
        )

    widths: dict[str, int] = {}
    columns_left = dim
    waiting = sorted(parameters, key=lambda p: wanted(p) / p.numel**0.5)
    claims_left = sum(p.numel**0.5 for p in waiting)
    for i, parameter in enumerate(waiting):
        claim = parameter.numel**0.5
        share = int(columns_left * claim / claims_left)
        most = columns_left - (len(waiting) - i - 1)
        exact = wanted(parameter) <= most and worth_it(wanted(parameter), claim)
        width = wanted(parameter) if exact else min(wanted(parameter), max(1, min(share, most)))
        widths[parameter.name] = width
        columns_left -= width
        claims_left -= claim
    for parameter in waiting:  # columns that rounding down has left over
        more = min(columns_left, wanted(parameter) - widths[parameter.name])
        widths[parameter.name] += more
        columns_left -= more
    return widths

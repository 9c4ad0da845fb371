"""Which columns of the gradient array hold which parameter, and in which encoding."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any, Literal, get_args

from hydra_pipe.errors import BudgetError, StoreError, shown
from hydra_pipe.maths.runs import run_length

Encoding = Literal["dense", "factored", "kron", "sketch"]
EncodingChoice = Literal["auto", "exact", "projected"]
ENCODING_CHOICES: tuple[EncodingChoice, ...] = get_args(EncodingChoice)

# A row of more elements is too large to be written out for every sample of a batch before it is projected.
LARGEST_WRITTEN_OUT = 2**20

Columns = tuple[int, int]  # first and one past the last
_LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Block:
    """One trainable parameter and where its rows are.

    Args:
        name: as in the model's `named_parameters`.
        shape: of the parameter.
        group: index of its parameter group in the optimiser.
        encoding: see docs/format.md.
        columns: of the row itself (dense, kron, sketch), or of the output-gradient factor (factored).
        inputs: of the input factor of a factored weight; None for a factored bias, whose input is 1 and whose columns are its
            weight's own, and for the other encodings.
        kron: (O, I, k_out, k_in) of a block in the encoding kron: what each side is projected from and to; None for the others.
    """

    name: str
    shape: tuple[int, ...]
    group: int
    encoding: Encoding
    columns: Columns
    inputs: Columns | None = None
    kron: tuple[int, int, int, int] | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def exact(self) -> bool:
        """Whether the encoding loses nothing but the dtype's rounding."""
        return self.encoding in ("dense", "factored")

    @property
    def variance(self) -> float:
        """Bound on the variance of the projected <x, y>, over |x|^2 |y|^2 (`hydra_pipe.maths.sketch`, `kron`); 0 where exact."""
        if self.encoding == "sketch":
            return 2 * 1.02 / (self.columns[1] - self.columns[0])
        return _kron_error(*self.kron) - 1.0 if self.kron else 0.0


@dataclass(frozen=True)
class Layout:
    """The block directory: every recorded parameter, in the order of the model's parameters.

    Args:
        blocks: one for each trainable parameter.
        n_features: columns in all.
        seed: of the random projections.
    """

    blocks: tuple[Block, ...]
    n_features: int
    seed: int

    @property
    def whole_width(self) -> int:
        """Features where factored blocks are multiplied out."""
        return sum(
            (block.columns[1] - block.columns[0]) * (1 if block.inputs is None else block.inputs[1] - block.inputs[0])
            for block in self.blocks
        )

    def to_json(self) -> dict[str, Any]:
        return {"n_features": self.n_features, "seed": self.seed, "blocks": [asdict(block) for block in self.blocks]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Layout":
        """Raises: StoreError: not a block directory, or one whose columns lie outside the array or are not each of one block."""
        try:
            n_features = _whole(data["n_features"], 1)
            blocks = tuple(_block_from_json(entry, n_features) for entry in data["blocks"])
            _check_columns(blocks, n_features)
            return Layout(blocks, n_features, _whole(data["seed"], None))
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"the block directory is damaged: {shown(error)}") from error


def factored_part(layout: Layout) -> tuple[Layout, list[int], list[int]]:
    """The factored blocks of `layout` with their columns side by side, and which columns and which blocks of it these are."""
    chosen = [index for index, block in enumerate(layout.blocks) if block.encoding == "factored"]
    runs = {run for index in chosen for run in (layout.blocks[index].columns, layout.blocks[index].inputs) if run is not None}
    columns: list[int] = []
    places: dict[Columns, Columns] = {}
    for first, last in sorted(runs):
        places[first, last] = (len(columns), len(columns) + last - first)
        columns += range(first, last)
    blocks = tuple(
        replace(block, columns=places[block.columns], inputs=None if block.inputs is None else places[block.inputs])
        for block in (layout.blocks[index] for index in chosen)
    )
    return Layout(blocks, len(columns), layout.seed), columns, chosen


def _block_from_json(data: Mapping[str, Any], n_features: int) -> Block:
    name, encoding = data["name"], data["encoding"]
    if not isinstance(name, str):
        raise TypeError(f"a block called {shown(name)}")

    def columns(key: str) -> Columns:
        first, last = (_whole(c, 0) for c in data[key])
        if not first < last <= n_features:
            raise ValueError(f"columns {first} to {last} of block {name} lie outside 0 to {n_features}")
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
        kron=_sides(data),
    )
    numel = 1
    for n in block.shape:  # not `numel`: a product of many large numbers takes for ever
        numel = _whole(numel * n, 1)
    if (block.kron is None) == (encoding == "kron") or (block.inputs is not None and encoding != "factored"):
        raise ValueError(f"block {name} is {encoding}, with inputs {data['inputs']} and kron {data['kron']}")
    return block


def _sides(data: Mapping[str, Any]) -> tuple[int, int, int, int] | None:
    if data["kron"] is None:
        return None
    outputs, inputs, k_out, k_in = (_whole(n, 1) for n in data["kron"])
    return outputs, inputs, k_out, k_in


def _check_columns(blocks: Sequence[Block], n_features: int) -> None:
    """Every column is of one block, but that a factored bias has those of its weight. Raises: ValueError."""
    biases = [block.columns for block in blocks if block.encoding == "factored" and block.inputs is None]
    owned = [
        run for block in blocks if block.encoding != "factored" or block.inputs for run in (block.columns, block.inputs) if run
    ]
    if len(set(biases)) < len(biases) or not {block.columns for block in blocks if block.inputs is not None}.issuperset(biases):
        raise ValueError("a factored bias has columns that are not those of a weight, or of two biases")
    end = 0
    for first, last in sorted(owned):
        if first != end:
            raise ValueError(f"columns {min(first, end)} to {max(first, end)} are of {'no block' if first > end else 'two blocks'}")
        end = last
    if end != n_features:
        raise ValueError(f"columns {end} to {n_features} are of no block")


def _whole(value: Any, least: int | None) -> int:
    """A whole number that fits 64 bits, `least` or more. Raises: ValueError."""
    if not isinstance(value, int) or isinstance(value, bool) or not (-_LARGEST if least is None else least) <= value <= _LARGEST:
        raise ValueError(f"{shown(value)} is no size or index")
    return value


@dataclass(frozen=True)
class Parameter:
    """What the layout is chosen from.

    Args:
        name: of the parameter.
        shape: of the parameter.
        group: index of its parameter group.
        factors: (outputs, inputs) where each sample's gradient is one outer product, else None.
        sides: (outputs, inputs) where each sample's gradient is a sum of outer products, over one position or many, else None.
        bias_of: name of the weight whose output factor is this parameter's gradient, else None.
    """

    name: str
    shape: tuple[int, ...]
    group: int
    factors: tuple[int, int] | None = None
    bias_of: str | None = None
    sides: tuple[int, int] | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def exact_width(self) -> int:
        """Columns of the narrowest lossless encoding."""
        return min(self.numel, sum(self.factors)) if self.factors else self.numel


def choose_layout(parameters: Sequence[Parameter], choice: EncodingChoice, dim: int, seed: int) -> Layout:
    """Give every parameter an encoding and columns.

    `exact`: the narrowest lossless encoding of each. `projected`: every parameter dense or projected, each with columns in
    proportion to the square root of its size, `dim` in all. `auto`: the narrowest lossless encoding while it is no wider than
    about twice that share of the budget that others have left (see `_widths`); the rest is projected to its share.

    A block is projected by a sketch, which is the more exact for as many columns, but has to be given the whole row; sums of
    outer products that are too large for that by `kron`.

    Args:
        parameters: in the order of the model.
        choice: see above.
        dim: budget in columns, not used by `exact`.
        seed: of the random projections.

    Raises:
        BudgetError: fewer columns than parameters to hold.
    """
    if choice != "exact" and dim < len(parameters):
        raise BudgetError(
            f"--dim {dim} is less than one column for each of the {len(parameters)} parameters: "
            f"raise it to {len(parameters)} or more"
        )
    factored = choice != "projected"
    biases = {p.bias_of: p for p in parameters if factored and p.bias_of and _prefers_factors(_by_name(p.bias_of, parameters))}
    while True:
        shared = {bias.name for bias in biases.values()}
        widths = _widths([p for p in parameters if p.name not in shared], choice, dim)
        sketched = [w for w in biases if widths[w] != _by_name(w, parameters).exact_width]
        if not sketched:
            break
        for weight in sketched:  # such a bias has no factor to share: it needs columns of its own, out of the same budget
            del biases[weight]

    placed: dict[str, Block] = {}
    first = 0
    for parameter in parameters:
        if parameter.name in shared:
            continue
        width = widths[parameter.name]
        name, shape, group = parameter.name, parameter.shape, parameter.group
        if factored and _prefers_factors(parameter) and width == parameter.exact_width:
            assert parameter.factors is not None
            middle = first + parameter.factors[0]
            placed[name] = Block(name, shape, group, "factored", (first, middle), (middle, first + width))
            if name in biases:
                bias = biases[name]
                placed[bias.name] = Block(bias.name, bias.shape, bias.group, "factored", (first, middle))
        elif width == parameter.numel:
            placed[name] = Block(name, shape, group, "dense", (first, first + width))
        elif parameter.sides is not None and parameter.numel > LARGEST_WRITTEN_OUT:
            pair = choose_sides(*parameter.sides, width)
            width = pair[0] * pair[1]
            placed[name] = Block(name, shape, group, "kron", (first, first + width), kron=(*parameter.sides, *pair))
        else:
            # longer runs are worth a column
            width -= width > 1 and run_length(parameter.numel, width - 1) > run_length(parameter.numel, width)
            placed[name] = Block(name, shape, group, "sketch", (first, first + width))
        first += width
    return Layout(tuple(placed[p.name] for p in parameters), first, seed)


def choose_sides(outputs: int, inputs: int, columns: int) -> tuple[int, int]:
    """The (k_out, k_in) of at most `columns` columns in all whose bound on the variance (`hydra_pipe.maths.kron`) is least.

    Of equal ones that of the smallest k_out.

    Args:
        outputs, inputs: O and I.
        columns: at least 1.
    """
    pairs = ((k_out, min(inputs, columns // k_out)) for k_out in range(1, min(outputs, columns) + 1))
    return min(pairs, key=lambda pair: _kron_error(outputs, inputs, *pair))


def _kron_error(outputs: int, inputs: int, k_out: int, k_in: int) -> float:
    """One plus the bound on the variance of the encoding kron."""

    def of_side(k: int, size: int) -> float:
        return 1.0 if k == size else 1.0 + 2.0 / k

    return of_side(k_out, outputs) * of_side(k_in, inputs)


def _prefers_factors(parameter: Parameter) -> bool:
    return parameter.factors is not None and sum(parameter.factors) < parameter.numel


def _by_name(name: str, parameters: Sequence[Parameter]) -> Parameter:
    """The parameter called `name`, which must be there."""
    return next(p for p in parameters if p.name == name)


def _widths(parameters: Sequence[Parameter], choice: EncodingChoice, dim: int) -> dict[str, int]:
    """Columns of each parameter: water filling, the narrowest for their share first, each given what it is worth of what is left.

    A block of energy E (the norm of its rows) projected to k columns adds E^2 / k to the variance of relevance, so k in proportion
    to E is best: then blocks of energies E_j in K columns add (sum E_j)^2 / K. E is not known before training; the root of the size
    stands for it. One of them that is exact in w columns adds nothing and leaves K - w to the others: worth it where
    (sum E_j - E)^2 / (K - w) <= (sum E_j)^2 / K, which is up to twice its share where it is one of many, and less where it is not.
    """
    if choice == "exact":
        return {p.name: p.exact_width for p in parameters}

    def wanted(p: Parameter) -> int:
        return p.numel if choice == "projected" else p.exact_width

    def worth_it(width: int, claim: float) -> bool:
        if choice == "projected":
            return width <= int(columns_left * claim / claims_left)
        return bool((claims_left - claim) ** 2 * columns_left <= claims_left**2 * (columns_left - width))

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
    for parameter in waiting:  # what rounding down has left over
        more = min(columns_left, wanted(parameter) - widths[parameter.name])
        widths[parameter.name] += more
        columns_left -= more
    return widths

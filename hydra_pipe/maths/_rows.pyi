from typing import Any

from numpy.typing import NDArray

Floats = NDArray[Any]
Numbers = tuple[int, ...]
Grids = tuple[NDArray[Any], NDArray[Any], int, int, float]

def products(
    left: Floats,
    pixels: Floats,
    kernel: Numbers,
    stride: Numbers,
    dilation: Numbers,
    before: Numbers,
    positions: Numbers,
    groups: int,
    out: Floats,
    sketch: tuple[NDArray[Any], NDArray[Any], int] | None,
    grids: Grids | None,
    threads: int,
    /,
) -> None: ...
def channel_sums(
    inputs: Floats, gradient: Floats, eps: float, rows: Floats, bounds: Floats, threads: int, /
) -> None: ...
def elements(left: Floats, right: Floats, grids: Grids, out: Floats, threads: int, /) -> None: ...
def sketch(
    rows: Floats, columns: NDArray[Any], signs: NDArray[Any], run: int, out: Floats, threads: int, /
) -> None: ...
def lines(
    tokens: NDArray[Any],
    values: Floats,
    columns: NDArray[Any],
    signs: NDArray[Any],
    run: int,
    out: Floats,
    threads: int,
    /,
) -> None: ...
def use(level: str, /) -> str: ...

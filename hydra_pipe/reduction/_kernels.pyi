from typing import Any

from numpy.typing import NDArray

Matrix = NDArray[Any]
Weight = NDArray[Any] | None

def decode(stored: Matrix, weight: Weight, out: Matrix, /) -> None: ...
def dots(stored: Matrix, weight: Weight, tests: Matrix, out: Matrix, /) -> None: ...
def fold(stored: Matrix, weight: Weight, samples: Matrix, sums: Matrix, /) -> None: ...

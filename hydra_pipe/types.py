"""Types that many modules share: arrays by their dtype, and half-open ranges."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Floating = NDArray[np.floating[Any]]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]
Bools = NDArray[np.bool_]
Span = tuple[int, int]  # first, and one past the last

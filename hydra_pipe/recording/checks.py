"""What every step is checked for before it is written: finite, and balanced books."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hydra_pipe.errors import BooksError, NonFiniteError
from hydra_pipe.maths.books import Balance, balance, best_explained
from hydra_pipe.plan.layout import Layout
from hydra_pipe.recording.encoder import EncodedRows, RowEncoder

# A difference between rows and gradient beyond rounding, relative to the summed norms of the rows.
IMBALANCE_LIMIT = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def check_finite(layout: Layout, encoded: EncodedRows, ids: NDArray[np.int64], when: str) -> None:
    """Refuse rows that hold an infinity or not a number.

    Args:
        layout: the block directory.
        encoded: the rows.
        ids: of their samples, shape (B,).
        when: the moment, in words such as "at step 3".

    Raises:
        NonFiniteError: names the first such block, and the samples.
    """
    if bool(torch.isfinite(encoded.largest.sum())):
        return
    finite = torch.isfinite(encoded.largest).cpu().numpy()
    columns = encoded.parts[int(finite.all(axis=0).argmin())][0]
    block = next(b for b in layout.blocks if (columns.start, columns.stop) in (b.columns, b.inputs))
    bad = ids[~finite.all(axis=1)]
    shown = ", ".join(map(str, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
    raise NonFiniteError(
        f"the gradient of {block.name} is not finite {when} for samples {shown}: lower the learning rate or clip; the steps "
        f"before it are recorded and readable"
    )


def check_books(
    encoder: RowEncoder,
    encoded: EncodedRows,
    gradients: Sequence[Tensor | None],
    when: str,
    half: bool,
    scalar: float | None = None,
) -> Balance:
    """Compare the rows with the gradient in use.

    Args:
        encoder: that made the rows.
        encoded: the rows.
        gradients: in use, of each block; None: the block has none.
        when: the moment, in words such as "at step 3".
        half: whether gradients went through half precision on their way.
        scalar: the gradient over the sum of the rows where it is known, else it is found.

    Raises:
        BooksError: they do not agree; names the block that is off most.
    """
    actual = [
        encoder.features_of(i, gradient) if gradient is not None else torch.zeros_like(encoded.expected[i])
        for i, gradient in enumerate(gradients)
    ]
    limit = np.array([IMBALANCE_LIMIT[torch.bfloat16 if half else vector.dtype] for vector in actual])
    books = balance(encoded.expected, actual, encoded.magnitude, scalar)
    if (books.imbalance <= limit).all():
        return books
    books = best_explained(encoded.expected, actual, encoded.magnitude, limit)
    if scalar is None and (books.imbalance <= limit).all():
        return books
    worst = int(np.argmax(np.nan_to_num(books.imbalance, nan=np.inf)))
    raise BooksError(
        f"the books do not balance {when}: the recorded rows of {encoder.layout.blocks[worst].name} miss "
        f"{books.imbalance[worst]:.2%} of its gradient. It is used where hooks cannot see it (a functional call such "
        f"as F.linear(x, module.weight), a penalty added to the loss, or .grad changed by hand): call its "
        f"module instead, or freeze it"
    )

"""Views of one input for a person: a picture, a text, or named values. This file needs Pillow."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hydra_pipe.errors import PipelineError

# Longest side of a picture, in pixels. Up to the second number every pixel is kept.
MOST_PIXELS, FEW_PIXELS = 128, 64
# Most characters of a text, and most columns of a row, that are kept.
MOST_CHARACTERS, MOST_CELLS = 20_000, 200
_CHANNELS = (1, 3)
_WITH_ALPHA = (1, 3, 4)
_JPEG_QUALITY = 85


@dataclass(frozen=True)
class Picture:
    """An image, as a data URL.

    Args:
        url: the data URL.
        width, height: size of the original, in pixels.
    """

    url: str
    width: int
    height: int

    @property
    def is_small(self) -> bool:
        """True if its pixels are to be seen as squares."""
        return max(self.width, self.height) <= FEW_PIXELS


@dataclass(frozen=True)
class Text:
    """A text, and its number of characters before it was cut."""

    text: str
    n_characters: int


@dataclass(frozen=True)
class Cells:
    """Named values, and their number before they were cut."""

    cells: tuple[tuple[str, str], ...]
    n_cells: int


Drawn = Picture | Text | Cells


def rendered(shown: Any) -> Drawn:
    """Return a view of the value that `render` returned.

    Raises:
        PipelineError: the value is no image, no str and no mapping.
    """
    if isinstance(shown, Drawn):
        return shown
    if isinstance(shown, str):
        return _text(shown)
    if isinstance(shown, Mapping):
        return _cells([(str(name), _value(value)) for name, value in shown.items()])
    if isinstance(shown, Image.Image):
        return _picture(shown)
    values = _array(shown)
    image = None if values is None else _image(values, _WITH_ALPHA)
    if image is None:
        found = type(shown).__name__ if values is None else f"an array of shape {values.shape}"
        raise PipelineError(
            f"render returned {found}: return an image, a str, or a mapping of name to value"
        )
    return image


def by_kind(value: Any) -> Drawn:
    """Return a view of an input by its kind.

    Kinds are images (float or uint8, with 1 or 3 channels or none), texts, token ids (integers,
    1-D), and rows of a table (floats, 1-D). Any other input is shown by its type and shape.
    """
    if isinstance(value, str):
        return _text(value)
    values = _array(value)
    if values is None:
        return _text(f"{type(value).__name__}, which is not drawn: give render=...")
    if values.ndim == 0:
        return _text(_value(values.item()))
    if values.ndim == 1 and values.dtype.kind in "iub":
        return _text(" ".join(map(str, values[:MOST_CHARACTERS].tolist())))
    if values.ndim == 1:
        # A row may be long, so only the values that are kept are converted.
        return _cells(
            [(str(i), _value(v)) for i, v in enumerate(values[: MOST_CELLS + 1].tolist())],
            len(values),
        )
    image = (
        _image(values, _CHANNELS) if values.dtype.kind == "f" or values.dtype == np.uint8 else None
    )
    return image or _text(
        f"{values.dtype} of shape {values.shape}, which is not drawn: give render=..."
    )


def _array(value: Any) -> NDArray[Any] | None:
    """Return a tensor, array or number as an array of numbers, or None for anything else."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # NumPy has no bfloat16.
        value = (value.float() if value.is_floating_point() else value).numpy()
    if not isinstance(value, np.ndarray | np.generic | int | float):
        return None
    values = np.asarray(value)
    return values if values.dtype.kind in "iufb" else None


def _image(values: NDArray[Any], channels: tuple[int, ...]) -> Picture | None:
    """Return an array of pixels as a picture, or None if its shape is not one of an image.

    Shapes are (height, width), with channels first or last.
    """
    if values.ndim == 3 and values.shape[0] in channels:
        values = np.moveaxis(values, 0, -1)
    if (
        values.ndim not in (2, 3)
        or (values.ndim == 3 and values.shape[-1] not in channels)
        or 0 in values.shape
    ):
        return None
    pixels = visible(values)
    return _picture(
        Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels)
    )


def visible(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Return pixels from 0 to 255, of the same shape.

    Values of uint8 stay as they are. Values within 0 to 1 are multiplied by 255. Others are
    stretched from the least to the largest. A value that is not finite counts as 0, and an image
    of one value outside 0 to 1 becomes grey.
    """
    if values.dtype == np.uint8:
        return values
    finite = np.where(np.isfinite(values), values, 0).astype(np.float64)
    low, high = float(finite.min()), float(finite.max())
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif low == high:
        return np.full(values.shape, 128, np.uint8)
    scaled: NDArray[np.uint8] = np.round((finite - low) / (high - low) * 255).astype(np.uint8)
    return scaled


def _picture(image: Image.Image) -> Picture:
    width, height = image.size
    content = io.BytesIO()
    if max(width, height) <= FEW_PIXELS:
        (image if image.mode in ("L", "RGB", "RGBA", "P", "1") else image.convert("RGB")).save(
            content, "PNG", optimize=True
        )
        kind = "png"
    else:
        image = image.convert("L" if image.mode in ("L", "1", "I;16") else "RGB")
        image.thumbnail((MOST_PIXELS, MOST_PIXELS))
        image.save(content, "JPEG", quality=_JPEG_QUALITY)
        kind = "jpeg"
    return Picture(
        f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}", width, height
    )


def _text(text: str) -> Text:
    return Text(clean(text[:MOST_CHARACTERS]), len(text))


def _cells(cells: list[tuple[str, str]], n_cells: int | None = None) -> Cells:
    kept = tuple(
        (clean(name[:MOST_CHARACTERS]), clean(value[:MOST_CHARACTERS]))
        for name, value in cells[:MOST_CELLS]
    )
    return Cells(kept, len(cells) if n_cells is None else n_cells)


def _value(value: Any) -> str:
    """Return one value of a row as text, numbers with four digits."""
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def clean(text: str) -> str:
    """Return `text` without what HTML cannot hold: NUL and other controls, and halves of pairs."""
    return "".join(c if c.isprintable() or c in "\n\t" or _is_format(c) else "\ufffd" for c in text)


def _is_format(character: str) -> bool:
    """Tell whether a character that is not printable is harmless.

    Harmless are spaces of all kinds, marks of direction, and joiners.
    """
    return (
        (character.isspace() and ord(character) >= 0x20)
        or 0x200B <= ord(character) <= 0x206F
        or character in "\xad\ufeff"
    )

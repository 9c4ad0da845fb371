"""Checkpoints of a run, written by torch: the final parameters and states of the training.

Only this file of the store needs torch.
"""

import hashlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from hydra_pipe.errors import StoreError
from hydra_pipe.store import names
from hydra_pipe.store.files import read_file, remove, replace_file, sync

# Number of kept checkpoints of a training. More than one, because the newest may be broken.
KEPT = 3
_NAME = re.compile(r"step-(\d{10,})-([0-9a-f]{16})\.pt")
# Errors of torch.load on bytes that torch did not write, or that hold more than plain values.
_UNREADABLE = (
    RuntimeError,
    UnpicklingError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
)


def save_final(directory: Path, model: nn.Module) -> str:
    """Save the parameters and buffers at which the test gradients were taken.

    Returns:
        SHA-256 of the file.
    """
    content = _packed(model.state_dict())
    _keep(directory / names.FINAL_CHECKPOINT, content)
    return hashlib.sha256(content).hexdigest()


def load_final(directory: Path, sha256: object) -> dict[str, Any]:
    """Return the parameters and buffers that `save_final` saved, by name.

    Raises:
        StoreError: the file is missing, or its SHA-256 is another.
    """
    path = directory / names.FINAL_CHECKPOINT
    try:
        content = read_file(path)
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read ({error}): record the run again with --overwrite"
        ) from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise StoreError(
            f"{path} is not what was written at the end of training: record the run again with "
            "--overwrite"
        )
    return unpacked(content)


def state_digests(model: nn.Module) -> dict[str, str]:
    """Return a digest of each parameter and buffer in the model's state_dict, by name.

    A digest is the first 16 digits of a SHA-256 of dtype, shape and values.
    """
    return {
        name: _digest_of(value)
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor)
    }


def _digest_of(value: torch.Tensor) -> str:
    own = value.detach().cpu().contiguous()
    found = hashlib.sha256(f"{own.dtype} {tuple(own.shape)}\n".encode())
    found.update(own.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


@dataclass(frozen=True)
class Checkpoint:
    """A file with the training's state.

    The file's name holds the step and the first digits of the content's SHA-256.

    Args:
        path: path of the file.
        step: number of steps that the training had taken.
        digest: first 16 digits of the content's SHA-256.
    """

    path: Path
    step: int
    digest: str

    def read(self) -> dict[str, Any]:
        """Return the saved tensors and plain values. Nothing in the file is executed.

        Raises:
            StoreError: the file is damaged.
        """
        try:
            content = read_file(self.path)
        except OSError as error:
            raise StoreError(f"{self.path} cannot be read ({error})") from error
        if _digest(content) != self.digest:
            raise StoreError(
                f"{self.path} is damaged: its content does not have the digest of its name"
            )
        return unpacked(content)


def save_checkpoint(directory: Path, step: int, state: Mapping[str, Any]) -> None:
    """Save the training's state after `step` steps, safe on the disk.

    The newest `KEPT` checkpoints stay, and older ones are removed.

    Raises:
        StoreError: `torch.load(weights_only=True)` would not read the state. Nothing was written.
        OSError: the disk is full or gone. Earlier checkpoints are unchanged.
    """
    content = _packed(state)
    unpacked(content)
    _keep(directory / f"step-{step:010d}-{_digest(content)}.pt", content)
    for old in checkpoints_in(directory)[KEPT:]:
        remove(old.path)


def checkpoints_in(directory: Path) -> list[Checkpoint]:
    """Return the checkpoints in `directory`, the newest first."""
    found = (
        [(entry, _NAME.fullmatch(entry.name)) for entry in directory.iterdir()]
        if directory.is_dir()
        else []
    )
    checkpoints = [Checkpoint(entry, int(match[1]), match[2]) for entry, match in found if match]
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.step, reverse=True)


def remove_checkpoints(directory: Path, after: int = -1) -> None:
    """Remove the checkpoints of more than `after` steps."""
    for checkpoint in checkpoints_in(directory):
        if checkpoint.step > after:
            remove(checkpoint.path)


def unpacked(content: bytes) -> dict[str, Any]:
    """Return the tensors and plain values in `content`, the bytes of a file of `torch.save`.

    Raises:
        StoreError: the content is anything else.
    """
    try:
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise StoreError(
            f"not a checkpoint of tensors and plain values ({str(error).strip().splitlines()[0]})"
        ) from error
    if not isinstance(found, dict):
        raise StoreError(f"a checkpoint that holds a {type(found).__name__}")
    return found


def _digest(content: bytes) -> str:
    """Return the digest that a checkpoint's name holds: 16 digits of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def _keep(path: Path, content: bytes) -> None:
    """Write a file, and return when it is safe on the disk. Raises: OSError."""
    replace_file(path, [content])
    for directory in (path.parent, path.parent.parent):
        sync(directory)


def _packed(state: Mapping[str, Any]) -> bytes:
    content = io.BytesIO()
    torch.save(dict(state), content)
    return content.getvalue()

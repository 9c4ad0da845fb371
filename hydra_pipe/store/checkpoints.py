"""Parameters of the model, as torch keeps them. The one file of this floor that needs torch."""

import hashlib
import io
from pathlib import Path

import torch
from torch import nn

from hydra_pipe.store import names
from hydra_pipe.store.files import replace_file


def save_final(directory: Path, model: nn.Module) -> str:
    """Keep the parameters and buffers that the test gradients were taken at. Returns the file's SHA-256."""
    content = io.BytesIO()
    torch.save(model.state_dict(), content)
    replace_file(directory / names.FINAL_CHECKPOINT, [content.getvalue()])
    return hashlib.sha256(content.getvalue()).hexdigest()

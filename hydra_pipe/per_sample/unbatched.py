"""Tell whether a module was called on one sample without a dimension for samples."""

from torch import Tensor, nn

from hydra_pipe.per_sample.patches import Conv, ConvTranspose

_INSTANCE_NORMS: dict[type[nn.Module], int] = {
    nn.InstanceNorm1d: 1,
    nn.InstanceNorm2d: 2,
    nn.InstanceNorm3d: 3,
}


def is_unbatched(module: nn.Module, output: Tensor) -> bool:
    """Tell whether `output` of `module` is that of one sample alone: its shape tells.

    Args:
        module: module with a layer rule.
        output: output of a call.
    """
    if isinstance(module, nn.Linear | nn.Bilinear | nn.Embedding):
        return output.dim() == 1
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return output.dim() == len(module.normalized_shape)
    if isinstance(module, Conv | ConvTranspose):
        return output.dim() == 1 + len(module.kernel_size)
    n_dims = next((n for kind, n in _INSTANCE_NORMS.items() if isinstance(module, kind)), None)
    return n_dims is not None and output.dim() == 1 + n_dims

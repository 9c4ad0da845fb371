"""Memory of a tensor, as a number. It works for backends whose tensors have no address too."""

from torch import Tensor


def storage_of(tensor: Tensor) -> int:
    """Return a number of the memory that `tensor` lies in. Views of one tensor have the same."""
    return int(tensor.untyped_storage()._cdata)


def address_of(tensor: Tensor) -> int:
    """Return a number of the first element's place. 0 is no address: the storage tells then."""
    return tensor.data_ptr() or storage_of(tensor) + int(tensor.storage_offset())

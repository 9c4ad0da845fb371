"""The processes that train one model, and all that they tell each other.

They are several with DistributedDataParallel, or one. Every method of `Collectives` is collective:
all ranks call it at the same point. Otherwise they wait for each other until the process group's
timeout. `SingleProcess` has the same methods, and waits for nobody.
"""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from hydra_pipe import errors
from hydra_pipe.errors import HydraError, RecordError, UsageError
from hydra_pipe.recording.refusals import sharding
from hydra_pipe.types import F64


def n_processes() -> int:
    """Return the size of torch.distributed's default group; 1 if it is not in use."""
    return (
        distributed.get_world_size()
        if distributed.is_available() and distributed.is_initialized()
        else 1
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module that DistributedDataParallel wraps, or `model` itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


class SingleProcess:
    """A process that trains alone."""

    rank, size = 0, 1
    is_first = True
    static_graph = False

    def gather(self, values: NDArray[np.float64] | list[float]) -> F64:
        """Return `values`, shape (1, n)."""
        return np.asarray(values, np.float64)[None]

    def gather_text(self, text: str) -> list[str]:
        """Return `text` alone."""
        return [text]

    def mean(self, values: F64) -> F64:
        """Return `values` themselves."""
        return values

    def require_same(self, settings: dict[str, Any]) -> None:
        """Do nothing: there is no other process to compare `settings` with."""

    def together(self) -> AbstractContextManager[None]:
        """Enter a block whose errors concern no other process."""
        return nullcontext()


class Collectives:
    """The processes of one DistributedDataParallel model.

    Args:
        model: model that the processes train.
        group: their process group. It is used only at points where it has nothing under way.
        static_graph: True if DistributedDataParallel was told that the graph is the same at each
            step.
    """

    def __init__(
        self, model: nn.Module, group: distributed.ProcessGroup, *, static_graph: bool
    ) -> None:
        self._group = group
        self.rank = distributed.get_rank(self._group)
        self.size = distributed.get_world_size(self._group)
        self.static_graph = static_graph
        parameter = next(model.parameters())
        # NCCL moves tensors on the GPU only, Gloo tensors on the CPU
        self._device = (
            parameter.device
            if "nccl" in str(distributed.get_backend(self._group))
            else torch.device("cpu")
        )

    @property
    def is_first(self) -> bool:
        """Tell whether this process keeps the manifest and the data common to the ranks."""
        return self.rank == 0

    def gather(self, values: NDArray[np.float64] | list[float]) -> F64:
        """Return every rank's `values`, shape (rank, n); n is the same on all ranks."""
        own = torch.as_tensor(np.asarray(values, np.float64), device=self._device)
        return torch.stack(self._gathered(own)).cpu().numpy()

    def gather_text(self, text: str) -> list[str]:
        """Return every rank's `text`."""
        own = np.frombuffer(text.encode(), np.uint8)
        sizes = self.gather([float(len(own))])[:, 0].astype(int).tolist()
        padded = np.zeros(max(*sizes, 1), np.uint8)
        padded[: len(own)] = own
        parts = self._gathered(torch.from_numpy(padded).to(self._device))
        return [
            bytes(part.cpu().numpy()[:size]).decode()
            for part, size in zip(parts, sizes, strict=True)
        ]

    def _gathered(self, own: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(parts, own, group=self._group)
        return parts

    def mean(self, values: F64) -> F64:
        """Return the mean of the ranks' `values`, bit for bit the same on all ranks.

        All ranks give `values` of one shape.
        """
        total = torch.as_tensor(values / self.size, device=self._device)
        distributed.all_reduce(total, group=self._group)
        return total.cpu().numpy()

    def require_same(self, settings: dict[str, Any]) -> None:
        """Refuse `settings` that differ between ranks. JSON must be able to hold them.

        Raises:
            UsageError: names the first setting that differs.
        """
        texts = self.gather_text(json.dumps(settings, sort_keys=True))
        for rank, other in enumerate(json.loads(text) for text in texts):
            for name, value in json.loads(texts[0]).items():
                if other.get(name) != value:
                    theirs = other.get(name)
                    raise UsageError(
                        f"{name} is {value!r} on rank 0, {theirs!r} on rank {rank}: give "
                        "Recorder the same on every rank"
                    )

    def raise_together(self, error: Exception | None) -> None:
        """Raise on every rank if any rank has an `error`.

        The error is that of the first such rank, and its message names the rank.
        """
        failed = self.gather([float(error is not None)])[:, 0]
        if failed.any():
            raise self.first_error(error, int(failed.argmax())) from error

    def first_error(self, error: Exception | None, rank: int) -> HydraError:
        """Return the error of `rank`, in the form that every rank raises.

        It has the same type, and its message names the rank.
        """
        kind, _, message = self.gather_text(f"{type(error).__name__}\n{error}")[rank].partition(
            "\n"
        )
        found = getattr(errors, kind, None)
        if (
            isinstance(found, type)
            and issubclass(found, HydraError)
            and "__init__" not in vars(found)
        ):
            return found(f"rank {rank}: {message}")
        return RecordError(f"rank {rank}: {kind}: {message}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Enter a block at whose end an error of one rank is raised on all ranks."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:  # noqa: BLE001 - every kind of error is raised on every rank
            error = caught
        self.raise_together(error)


Processes = SingleProcess | Collectives


def processes_of(model: nn.Module, group: distributed.ProcessGroup | None = None) -> Processes:
    """Return the processes that train `model` together.

    Args:
        model: model wrapped in DistributedDataParallel; or the module inside, with the `group` that
            trains it.
        group: process group, for a `model` that is not wrapped.

    Raises:
        RecordError: there are several processes, `model` is not wrapped, and no group is given.
    """
    if n_processes() == 1:
        return SingleProcess()
    if isinstance(model, DistributedDataParallel):
        ranks = Collectives(model, model.process_group, static_graph=bool(model.static_graph))
    elif group is not None:
        ranks = Collectives(model, group, static_graph=False)
    else:
        raise RecordError(
            sharding(model)
            or f"{n_processes()} processes train together and the model is "
            f"{type(model).__name__}: wrap it in "
            "torch.nn.parallel.DistributedDataParallel before it is given to Recorder, or give "
            "process_group if another "
            f"wraps it; other ways of training in parallel are not recorded"
        )
    return ranks if ranks.size > 1 else SingleProcess()

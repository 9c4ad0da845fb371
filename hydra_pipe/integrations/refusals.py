"""Trainers of transformers and TRL that cannot be recorded, recognised by their arguments.

The arguments are those of the trainer and those of the model's call.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from hydra_pipe.errors import UsageError
from hydra_pipe.recording.refusals import TRAIN_UNSHARDED


def refuse_training_arguments(args: Any) -> None:
    """Refuse options of the trainers of transformers and TRL whose batches cannot be recorded.

    Args:
        args: instance of transformers.TrainingArguments or of a subclass.

    Raises:
        UsageError: names the option and a way out.
    """
    for option, why in (
        (
            "packing",
            "puts several samples into one sequence, whose gradient cannot be split between them",
        ),
        (
            "padding_free",
            "puts the batch's samples into one sequence, whose gradient cannot be split between "
            "them",
        ),
        (
            "use_liger_kernel",
            "takes the loss from the weight of the head without calling the head, where no hook "
            "sees it",
        ),
    ):
        if getattr(args, option, False):
            raise UsageError(f"{option}=True {why}: train with {option}=False")
    parallelism = getattr(args, "parallelism_config", None)
    sizes = {
        n: getattr(parallelism, n, 1) for n in ("tp_size", "cp_size", "sp_size", "dp_shard_size")
    }
    if sharded := [n for n, size in sizes.items() if isinstance(size, int) and size > 1]:
        raise UsageError(
            f"parallelism_config has {sharded[0]}={sizes[sharded[0]]}, which shards the model: "
            f"{TRAIN_UNSHARDED}"
        )
    kind = next((t for t in type(args).__mro__ if t.__module__.partition(".")[0] == "trl"), None)
    if kind is None:
        return
    if kind.__name__ not in ("SFTConfig", "PRMConfig"):
        raise UsageError(
            f"the trainer of {kind.__name__} puts its batches together itself (pairs, generated "
            "texts, a reference model), so their samples are unknown: write the loop with "
            "hydra_pipe.Recorder, a pair being one sample"
        )
    if hasattr(args, "loss_type") and args.loss_type in (None, "chunked_nll"):
        raise UsageError(
            f"loss_type={args.loss_type!r} of {kind.__name__} takes the loss from the weight of "
            "the head in chunks, without "
            f'calling the head, where no hook sees it: give SFTConfig(..., loss_type="nll")'
        )


def unnamed_pass(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Return the message for a trainer's loss that calls the model without the batch's ids.

    The batch itself holds these ids.

    Args:
        model: the called model.
        inputs: named arguments of the call.
    """
    given = ", ".join(f"{name}=" for name in inputs) or "unnamed arguments only"
    return (
        f"the trainer called {type(model).__name__} with {given}, without the sample ids that the "
        "batch holds: let compute_loss call model(**inputs) with the whole batch (take labels "
        "out of a copy first if need be). If it makes a batch of its own, name the batch by "
        "callback.recorder.next_batch(ids)"
    )

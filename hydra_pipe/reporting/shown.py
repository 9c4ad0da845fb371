"""Samples that a user has at hand, for a report."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ShownSamples:
    """Samples to look at, where no pipeline knows them: of a loop of one's own, or of a trainer::

        shown = ShownSamples(train, test, lambda sample: tokenizer.decode(sample["input_ids"]))
        hydra_pipe.report("runs/sst2", samples=shown)

    Args:
        train, test: what has a sample for each id, as `train[3]`.
        render: from a sample to what a person sees of it: an image, a str, or a mapping of name to value; None: by its kind.
    """

    train: Any
    test: Any
    render: Callable[[Any], Any] | None = None

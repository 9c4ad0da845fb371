"""Samples that a user gives to a report."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ShownSamples:
    """Samples to look at, if no pipeline knows them.

    They come from a loop of one's own, or from a trainer::

        shown = ShownSamples(train, test, lambda sample: tokenizer.decode(sample["input_ids"]))
        hydra_pipe.report("runs/sst2", samples=shown)

    Args:
        train, test: collections that give a sample for an id, such as `train[3]`.
        render: function from a sample to an image, a str, or a mapping of name to value, for a
            person to see. None draws a sample by its kind.
    """

    train: Any
    test: Any
    render: Callable[[Any], Any] | None = None

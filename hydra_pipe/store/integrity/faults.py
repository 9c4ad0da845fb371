"""Faults that a check of a run finds."""

from dataclasses import dataclass
from typing import Literal

from hydra_pipe.store.run.stages import StageId

# damaged: the result of a stage cannot be used.
# extra: something belongs to no stage.
# unfinished: a stage is not complete, which is no damage.
# unlisted: the footprints of a stage are lost.
# manifest, copy, group: a file that can be written again from something else.
Kind = Literal["damaged", "extra", "unfinished", "unlisted", "manifest", "copy", "group"]


@dataclass(frozen=True)
class Fault:
    """A fault of a run.

    Args:
        where: file, array or directory, relative to the run.
        found: description of what is wrong.
        consequence: meaning of the fault, and advice. Empty where `found` has both.
        kind: kind of the fault, one of `Kind`.
        stage: stage whose result has the fault.
    """

    where: str
    found: str
    consequence: str = ""
    kind: Kind = "damaged"
    stage: StageId | None = None

    @property
    def what(self) -> str:
        """Description of the fault, with its consequence."""
        return f"{self.found}: {self.consequence}" if self.consequence else self.found

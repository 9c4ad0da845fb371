"""What checking a run finds."""

from dataclasses import dataclass
from typing import Literal

from hydra_pipe.store.stages import StageId

# damaged: a stage's result cannot be used. extra: something that belongs to no stage. unfinished: a stage, which is no damage.
# unlisted: the footprints of a stage are lost. manifest, copy, group: what can be written again from something else.
Kind = Literal["damaged", "extra", "unfinished", "unlisted", "manifest", "copy", "group"]


@dataclass(frozen=True)
class Fault:
    """Something that is off.

    Args:
        where: file, array or directory, relative to the run.
        found: what is wrong with it.
        consequence: what that means, and what to do; empty where `found` says so.
        kind: see above.
        stage: whose result it is.
    """

    where: str
    found: str
    consequence: str = ""
    kind: Kind = "damaged"
    stage: StageId | None = None

    @property
    def what(self) -> str:
        """What is wrong, and what that means."""
        return f"{self.found}: {self.consequence}" if self.consequence else self.found

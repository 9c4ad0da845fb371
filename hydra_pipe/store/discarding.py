"""Discarding stages: what they claim, and what they have written."""

from hydra_pipe.store.files import remove
from hydra_pipe.store.run import RunDirectory
from hydra_pipe.store.stages import StageId


def discard(run: RunDirectory, *stages: StageId) -> None:
    """Forget `stages`, and remove what they have written.

    A call that is killed leaves them in the manifest, as begun and without anything done, until all of it is removed: by their
    names the next call knows what there is left to remove, and nobody goes on with half of it.
    """
    for stage in stages:
        run.begin(stage, run.stages[stage].settings)
    for stage in stages:
        for place in stage.places:
            remove(run.path / place)
        remove(run.path / stage.checksums_file)
    if stages:
        run.forget(*stages)

"""Discarding of stages: their entries in the manifest, and their files."""

from hydra_pipe.store.files import remove
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import StageId


def discard(run: RunDirectory, *stages: StageId) -> None:
    """Forget `stages`, and remove their files.

    The stages first become "running" in the manifest, with nothing done. They stay there until
    all their files are removed. So after a call that was killed, the next call knows what is
    left to remove, and nobody resumes a stage with half of its files.
    """
    for stage in stages:
        run.begin(stage, run.stages[stage].settings)
    for stage in stages:
        for place in stage.places:
            remove(run.path / place)
        remove(run.path / stage.checksums_file)
    if stages:
        run.forget(*stages)

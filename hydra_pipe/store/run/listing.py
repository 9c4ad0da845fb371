"""Membership of files in a run, by the footprints of each complete stage in its manifest.

An older run may have left other files in the same directories. So may a copy that deletes
nothing at its target. Such files have the right names and the right form, but no stage owns
them. A reader passes over them.
"""

from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress

from hydra_pipe.errors import StoreError, shown
from hydra_pipe.progress import Progress
from hydra_pipe.store import names
from hydra_pipe.store.files import files_below, is_partial, read_file
from hydra_pipe.store.json_parsing import MOST_JSON_BYTES
from hydra_pipe.store.run.footprints import Footprints, digest, name_of, places
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.stages import CHECKSUMS, DIRECTORIES, REDUCE, StageId
from hydra_pipe.store.zarr.arrays import CHUNKS, METADATA, Array

# Function that tells by its name in the store whether a group or an array belongs there.
Listed = Callable[[str], bool]
# The most unlisted arrays and tables that are named in a message.
_NAMED = 3


def footprints_or_fault(run: RunDirectory, stage: StageId) -> Footprints | str:
    """Return the footprints of a complete `stage`, or a description of their file's fault."""
    try:
        content = read_file(run.path / stage.checksums_file, MOST_JSON_BYTES)
        same = digest(content) == run.stages[stage].facts.get(CHECKSUMS)
        return (
            Footprints.parse(content)
            if same
            else f"is not what was written: {names.MANIFEST} has another SHA-256"
        )
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError) as error:
        return f"is damaged ({shown(error)})"


def listed(run: RunDirectory, stage: StageId) -> Listed | None:
    """Return a function that tells which groups and arrays belong to a complete `stage`.

    None where the manifest says nothing of checksums: then all that exist belong.

    Raises:
        StoreError: the list is lost. Nothing else tells the files of the stage from the files
            of an older run.
    """
    if CHECKSUMS not in run.stages[stage].facts:
        return None
    found = footprints_or_fault(run, stage)
    if isinstance(found, str):
        raise StoreError(
            f"{run.path / stage.checksums_file} {found}: without it the files of {stage} "
            f"cannot be told from those of an older run: run hydra-pipe verify {run.path} "
            "--repair, which writes it again if it can"
        )
    return members_of(stage, found)


def members_of(stage: StageId, footprints: Footprints) -> Listed:
    """Return a function that tells which groups and arrays are among the `footprints`.

    Args:
        stage: stage whose area holds them.
        footprints: footprints of the stage.
    """
    start, end = f"{stage.area}/", f"/{METADATA}"
    own = frozenset(
        name.removeprefix(start).removesuffix(end)
        for name in footprints.files
        if name.endswith(end)
    )
    return own.__contains__


def coordinate_names(run: RunDirectory) -> set[str]:
    """Return the names of arrays of coordinates that the results of a run may have."""
    own = set(map(names.columns_dimension, run.of_kind(REDUCE)))
    return own | {names.SAMPLE_DIM, names.TEST_DIM, names.SAMPLE_LABEL, names.TEST_LABEL}


def unlisted(run: RunDirectory) -> list[str]:
    """Return the arrays, groups and tables in the directories of a run that no stage lists.

    Files of an unfinished stage, or of one whose list is lost, are left out: nothing tells
    whose they are.
    """
    own = {stage.checksums_file for stage in run.stages}
    own |= {f"{names.CHECKSUMS}/{names.MANIFEST}", f"{names.RELEVANCE}/{METADATA}"}
    arrays: dict[str, int] = {}
    # Coordinates belong to several stages, and their content is checked elsewhere.
    untold = {f"{names.RELEVANCE}/{name}" for name in coordinate_names(run)}
    for which, stage in run.stages.items():
        found = footprints_or_fault(run, which) if stage.state == "complete" else ""
        if isinstance(found, str):
            untold.add(which.area)
        else:
            own |= set(found.files)
            arrays |= {array: len(files) for array, files in found.arrays.items()}
    strays: set[str] = set()
    chunks: dict[str, list[str]] = defaultdict(list)
    for place in DIRECTORIES:
        if place in untold:  # a process may be writing it, file by file
            continue
        for file in files_below(run.path / place):
            whole = f"{place}/{file}"
            array, is_chunk, _ = whole.partition(f"/{CHUNKS}/")
            if whole in own or is_partial(whole) or f"{place}/{file.split('/')[0]}" in untold:
                continue
            if is_chunk and array in arrays:
                chunks[array].append(whole.removeprefix(f"{array}/"))
            else:
                strays.add(array if is_chunk else whole.removesuffix(f"/{METADATA}"))
    for array, found_chunks in chunks.items():
        if len(found_chunks) > arrays[array]:
            with suppress(StoreError):  # a damaged array is reported by its reader
                wanted = set(map(name_of, places(Array.open(run.path / array))))
                strays |= {f"{array}/{chunk}" for chunk in found_chunks if chunk not in wanted}
    return sorted(strays, key=lambda name: (DIRECTORIES.index(name.partition("/")[0]), name))


def say_unlisted(run: RunDirectory, progress: Progress) -> None:
    """Tell the user which files in a run are not its own, before a stage works beside them."""
    found: list[str] = []
    with suppress(OSError):  # another process may have just removed a directory
        found = unlisted(run)
    if found:
        more = f" and {len(found) - _NAMED:,} more" if len(found) > _NAMED else ""
        progress.say(
            f"not read, because {names.MANIFEST} does not list them: "
            f"{', '.join(found[:_NAMED])}{more}. An older run, or a copy that deletes nothing "
            f"(rsync without --delete), has left them: hydra-pipe verify {run.path} --repair "
            "moves them away"
        )

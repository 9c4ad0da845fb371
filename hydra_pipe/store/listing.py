"""What counts in a run: what its manifest lists, by the footprints of each complete stage.

An older run, or a copy that deletes nothing at its target, may have left other files in the same directories. They are of the
right names and form, and are nobody's: a reader passes over them.
"""

from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress

from hydra_pipe.errors import StoreError, shown
from hydra_pipe.progress import Progress
from hydra_pipe.store import names
from hydra_pipe.store.arrays import CHUNKS, METADATA, Array
from hydra_pipe.store.checksums import Footprints, digest, name_of, places
from hydra_pipe.store.files import files_below, is_partial, read_file
from hydra_pipe.store.parsing import MOST_JSON_BYTES
from hydra_pipe.store.run import RunDirectory
from hydra_pipe.store.stages import CHECKSUMS, DIRECTORIES, REDUCE, StageId

# whether a group or an array of a store counts, by its name in the store
Listed = Callable[[str], bool]
# of the files that nobody lists, arrays and tables that are named
_NAMED = 3


def footprints_or_fault(run: RunDirectory, stage: StageId) -> Footprints | str:
    """What a complete `stage` has written, or what is wrong with the file that says so."""
    try:
        content = read_file(run.path / stage.checksums_file, MOST_JSON_BYTES)
        same = digest(content) == run.stages[stage].facts.get(CHECKSUMS)
        return Footprints.parse(content) if same else f"is not what was written: {names.MANIFEST} has another SHA-256"
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError) as error:
        return f"is damaged ({shown(error)})"


def listed(run: RunDirectory, stage: StageId) -> Listed | None:
    """Which groups and arrays in the area of a complete `stage` are its own. None: all that are there, for its manifest says
    nothing of checksums.

    Raises:
        StoreError: the list is lost, and nothing tells the files of the stage from those of an older run.
    """
    if CHECKSUMS not in run.stages[stage].facts:
        return None
    found = footprints_or_fault(run, stage)
    if isinstance(found, str):
        raise StoreError(
            f"{run.path / stage.checksums_file} {found}: nothing else tells the files of {stage} from those of an older "
            f"run: run hydra-pipe verify {run.path} --repair, which writes it again where it can"
        )
    return members_of(stage, found)


def members_of(stage: StageId, footprints: Footprints) -> Listed:
    """Which groups and arrays in the area of `stage` are among its `footprints`."""
    start, end = f"{stage.area}/", f"/{METADATA}"
    own = frozenset(name.removeprefix(start).removesuffix(end) for name in footprints.files if name.endswith(end))
    return own.__contains__


def coordinate_names(run: RunDirectory) -> set[str]:
    """Arrays of coordinates that the results of a run may have beside them."""
    own = set(map(names.columns_dimension, run.of_kind(REDUCE)))
    return own | {names.SAMPLE_DIM, names.TEST_DIM, names.SAMPLE_LABEL, names.TEST_LABEL}


def unlisted(run: RunDirectory) -> list[str]:
    """Arrays, groups and tables that lie in the directories of a run and that its manifest does not list, by name.

    What belongs to an unfinished stage, or to one whose list is lost, cannot be told and is left out.
    """
    own = {stage.checksums_file for stage in run.stages}
    own |= {f"{names.CHECKSUMS}/{names.MANIFEST}", f"{names.RELEVANCE}/{METADATA}"}
    arrays: dict[str, int] = {}
    # what they say is checked, and they are of several stages
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
        if place in untold:  # which a process may be writing, file by file
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
            with suppress(StoreError):  # the array is damaged, which its reader tells
                wanted = set(map(name_of, places(Array.open(run.path / array))))
                strays |= {f"{array}/{chunk}" for chunk in found_chunks if chunk not in wanted}
    return sorted(strays, key=lambda name: (DIRECTORIES.index(name.partition("/")[0]), name))


def say_unlisted(run: RunDirectory, progress: Progress) -> None:
    """Say which files lie in a run and are not its own, before a stage works beside them."""
    found: list[str] = []
    with suppress(OSError):  # of a directory that another process has just removed
        found = unlisted(run)
    if found:
        more = f" and {len(found) - _NAMED:,} more" if len(found) > _NAMED else ""
        progress.say(
            f"not read, for {names.MANIFEST} does not list them: {', '.join(found[:_NAMED])}{more}. An older run, or a copy that "
            f"deletes nothing (rsync without --delete), has left them: hydra-pipe verify {run.path} --repair moves them away"
        )

"""A whole proposal: training samples to relabel or drop, and its files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from hydra_pipe.cleaning.by_dynamics import proposed_by_dynamics
from hydra_pipe.cleaning.by_relevance import proposed_by_relevance
from hydra_pipe.cleaning.decision import Cut
from hydra_pipe.cleaning.proposal import Cleaning
from hydra_pipe.errors import UsageError
from hydra_pipe.progress import Progress
from hydra_pipe.store.data.clean_result import (
    RETRAINING,
    carry_retrained,
    read_proposal,
    write_proposal,
    write_retraining,
)
from hydra_pipe.store.data.evaluations import Retrained
from hydra_pipe.store.files import remove_partials
from hydra_pipe.store.run.listing import say_unlisted
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import DYNAMICS, ResultName
from hydra_pipe.store.run.stage_runner import Work, alone, running
from hydra_pipe.store.run.stages import CLEAN, REDUCE, Settings
from hydra_pipe.units import parse_bytes

if TYPE_CHECKING:
    from hydra_pipe.training.pipeline import Pipeline

# Fact of the stage: number of seeds of the stored retrainings.
_SEEDS = "seeds"
_Row = dict[str, Any]


def clean_run(
    run: str | os.PathLike[str],
    *,
    method: str = DYNAMICS,
    lowest: int | None = None,
    threshold: float | None = None,
    cautious: bool = False,
    retrain: bool = False,
    seeds: int | None = None,
    pipeline: "str | Pipeline | None" = None,
    memory: str = "4GiB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Cleaning:
    """Propose training samples to relabel or drop.

    By default a sample is proposed if the network did not believe its label while it trained: no
    test samples and no `reduce` are needed. With the name of a result, a sample is proposed if
    its relevance, summed over the test samples, is far below that of the samples with the same
    label. docs/cleaning.md describes both rules, and how well they find wrong labels.

    Args:
        run: directory of the run.
        method: "dynamics", or name of the result whose relevance decides, such as
            "hydra-fisher" or "influence-mean".
        lowest: number of samples to propose: those with the most suspicious labels.
        threshold: score below which samples are proposed, in robust standard deviations. It is
            fitted if neither `lowest` nor `threshold` is given. Not for "dynamics".
        cautious: True to propose only labels that are likelier wrong than right. For "dynamics".
        retrain: True to also train again without the proposed samples, without as many others,
            and with all. Accuracy and loss are compared on test samples that did not choose the
            proposal.
        seeds: with `retrain`: number of initial weights and orders for each training. Default:
            3, or 1 if the pipeline has no setting `seed`.
        pipeline: with `retrain`: "path/to/file.py:function" if the file has moved, or a newly
            built Pipeline if such an object was recorded.
        memory: with `retrain`: budget of this process.
        overwrite: replace a proposal that was made with other settings.
        progress: place to show progress. Default: nowhere.

    Returns:
        The proposal. It is also in RUN/cleaning/method=METHOD, as `keep.txt`, `drop.parquet` and
        `summary.json`.

    Raises:
        RunError: there is no run, it lacks the relevance, or a proposal was made with other
            settings.
        StoreError: the relevance is damaged.
        NonFiniteError: the relevance has infinite values, or values that are not a number.
        UsageError: a value is not possible.
        PipelineError: with `retrain`: the pipeline cannot be used, or its test losses differ
            from those of the run.
    """
    cut = Cut(lowest, threshold, cautious)
    _check(method, cut, retrain, seeds, pipeline)
    parse_bytes(memory)
    progress = progress or Progress()
    directory = RunDirectory.open(run)
    if method == DYNAMICS:
        directory.require_recording()
    else:
        directory.require(REDUCE.of(method), directory.command(REDUCE.of(method)))
    subject = None
    if retrain:
        from hydra_pipe.cleaning.retraining import opened  # torch takes seconds to import

        subject, seeds = opened(directory, pipeline, seeds)
    proposal = _Proposal(directory, method, cut)
    with alone(directory, proposal.stage):
        found = None if overwrite else proposal.existing()
        if found is None:
            say_unlisted(directory, progress)
            with proposal.running() as work:
                found = _proposed(directory, method, cut, progress)
                _write(work, found, carry=not overwrite)
        if subject is not None and proposal.seeds != seeds:
            from hydra_pipe.cleaning.retraining import compared

            with proposal.running() as work:
                pieces = Retrained(work.place)
                rows, summary = compared(
                    subject,
                    method,
                    cut,
                    found.drop,
                    pieces,
                    progress,
                    seeds=seeds or 1,
                    memory=memory,
                )
                found = replace(
                    found,
                    is_new=True,
                    retraining=rows,
                    summary=found.summary | {RETRAINING: summary},
                )
                _write(work, found, carry=True)
                work.facts[_SEEDS] = seeds
    return found


def _proposed(directory: RunDirectory, method: str, cut: Cut, progress: Progress) -> Cleaning:
    if method == DYNAMICS:
        return proposed_by_dynamics(directory, cut, progress)
    return proposed_by_relevance(directory, method, cut, progress)


def _check(method: str, cut: Cut, retrain: bool, seeds: int | None, pipeline: object) -> None:
    """Refuse options that do not go together.

    Raises:
        UsageError: an option needs another one, or a value is not possible.
    """
    if method == DYNAMICS and cut.threshold is not None:
        raise UsageError(
            "--threshold is for relevance: give --lowest or --cautious, or --method hydra"
        )
    if method != DYNAMICS and cut.cautious:
        raise UsageError(
            f"--cautious is for labels judged by dynamics: leave out --method {method}"
        )
    if ResultName.parse(method).is_of_itself:
        raise UsageError(f"--method {method} has no test samples: choose another method")
    if retrain and ResultName.parse(method).probe is not None:
        raise UsageError(
            f"--retrain measures accuracy on the run's own tests, and {method} is relevance for a "
            "probe: leave out --retrain"
        )
    if not retrain and (seeds is not None or pipeline is not None):
        raise UsageError(
            f"{'--seeds' if seeds is not None else '--pipeline'} is for --retrain: add it"
        )
    if seeds is not None and seeds < 1:
        raise UsageError(f"--seeds {seeds}: give 1 or more")


class _Proposal:
    """The stage of a proposal.

    Args:
        directory: directory of the run.
        method: name of the relevance.
        cut: rule of the proposal.
    """

    def __init__(self, directory: RunDirectory, method: str, cut: Cut) -> None:
        self._directory = directory
        self.stage = CLEAN.of(method)
        own = "cautious" if method == DYNAMICS else "threshold"
        self._settings: Settings = {"lowest": cut.lowest, own: getattr(cut, own)}

    @property
    def seeds(self) -> object:
        """Number of seeds of the complete stage's retrainings, or None if it has none."""
        return self._directory.stages[self.stage].facts.get(_SEEDS)

    def existing(self) -> Cleaning | None:
        """Return the stored proposal, or None if it cannot serve.

        It cannot serve if it is missing, unfinished or damaged, or was made from other relevance
        than is there now.

        Raises:
            RunError: the proposal was made with other settings.
        """
        directory = self._directory
        if directory.has_work(self.stage, self._settings) or directory.stale(self.stage):
            return None
        n_samples = directory.stages[self.stage].count("n_samples", least=1)
        with suppress(OSError, ValueError, pa.ArrowException):
            return Cleaning(False, *read_proposal(directory.path / self.stage.area, n_samples))
        return None

    @contextmanager
    def running(self) -> Iterator[Work]:
        """Run the stage for the length of a block, which ends with `_write`."""
        with running(self._directory, self.stage, self._settings) as work:
            remove_partials(work.place)
            yield work


def _write(work: Work, found: Cleaning, *, carry: bool) -> None:
    """Replace all files of the stage. With `carry`, the stored retrainings stay."""
    with work.replaced() as partial:
        write_proposal(partial, found.keep, found.drop, found.summary)
        if found.retraining:
            write_retraining(partial, found.retraining)
        if carry:
            carry_retrained(work.place, partial)
    n_proposed = found.drop.num_rows
    work.facts |= {"n_samples": len(found.keep) + n_proposed, "n_proposed": n_proposed}

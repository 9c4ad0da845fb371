"""A whole proposal: training samples to relabel or drop, and its files."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pyarrow as pa

from hydra_pipe.cleaning.by_dynamics import Seen, proposed_by_dynamics
from hydra_pipe.cleaning.by_relevance import proposed_by_relevance
from hydra_pipe.cleaning.decision import Cut
from hydra_pipe.cleaning.decisions import UNDECIDED, Decisions, decided
from hydra_pipe.cleaning.hurts import hurting, with_hurts
from hydra_pipe.cleaning.proposal import Cleaning
from hydra_pipe.errors import UsageError
from hydra_pipe.progress import Progress
from hydra_pipe.store import names
from hydra_pipe.store.data.clean_result import (
    HURTS,
    RETRAINING,
    carry_retrained,
    read_proposal,
    write_proposal,
    write_retraining,
)
from hydra_pipe.store.data.evaluations import Retrained
from hydra_pipe.store.data.reduced_run import keys_of
from hydra_pipe.store.files import remove_partials
from hydra_pipe.store.run.listing import say_unlisted
from hydra_pipe.store.run.manifest import RunDirectory
from hydra_pipe.store.run.results import DYNAMICS, ResultName
from hydra_pipe.store.run.stage_runner import Work, alone, running
from hydra_pipe.store.run.stages import CLEAN, REDUCE, Settings
from hydra_pipe.units import parse_bytes

if TYPE_CHECKING:
    from hydra_pipe.retraining.subject import Subject
    from hydra_pipe.training.pipeline import Pipeline

# Key of the summary: settings of the stage that made the proposal.
_SETTINGS = "settings"
# Fact of the stage: number of seeds of the stored retrainings.
_SEEDS = "seeds"


def clean_run(
    run: str | os.PathLike[str],
    *,
    method: str = DYNAMICS,
    lowest: int | None = None,
    threshold: float | None = None,
    cautious: bool = False,
    rounds: int | None = None,
    decisions: str | os.PathLike[str] | None = None,
    undecided: str | None = None,
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
        rounds: number of times to judge. 2: train on the cleaned labels, in RUN-round-2, and
            judge the given labels by that training too. Default: 1. For "dynamics".
        decisions: CSV file with the columns sample, decision (keep, relabel or drop) and label
            (class number, for relabel), such as the page of the report saves. The column key may
            stand in place of sample, where samples have keys. Decisions replace proposals. Unless
            another cut is asked for, they apply to the proposal that is there.
        undecided: with `decisions`: "proposed" leaves the other proposals as they are, "keep"
            keeps their samples. Default: "proposed".
        retrain: True to also train again as given, without the proposed samples, with the
            suggested labels, with both, and weighted by the chances, each beside as many other
            samples at random. Accuracy and loss are compared on test samples that did not choose
            the proposal.
        seeds: with `retrain`: number of initial weights and orders for each training. Default:
            3, or 1 if the pipeline has no setting `seed`.
        pipeline: with `retrain` or `rounds`: "path/to/file.py:function" if the file has moved, or
            a newly built Pipeline if such an object was recorded.
        memory: with `retrain`: budget of this process.
        overwrite: replace a proposal that was made with other settings, and forget its decisions.
        progress: place to show progress. Default: nowhere.

    Returns:
        The proposal. It is also in RUN/cleaning/method=METHOD, as `keep.txt`, `drop.parquet`,
        `relabel.parquet`, `judged.parquet` and `summary.json`.

    Raises:
        RunError: there is no run, it lacks the relevance, or a proposal was made with other
            settings.
        StoreError: the relevance is damaged.
        NonFiniteError: the relevance has infinite values, or values that are not a number.
        UsageError: a value is not possible.
        PipelineError: with `retrain` or `rounds`: the pipeline cannot be used.
    """
    request = _Request(
        method, Cut(lowest, threshold, cautious), rounds, decisions, undecided, retrain, seeds
    )
    request.check(pipeline)
    parse_bytes(memory)
    progress = progress or Progress()
    directory = RunDirectory.open(run)
    if method == DYNAMICS:
        directory.require_recording()
    else:
        directory.require(REDUCE.of(method), directory.command(REDUCE.of(method)))
    given = None
    if decisions is not None:
        keys = keys_of(directory, method)
        given = Decisions.read(decisions, undecided or UNDECIDED[0], keys)
    subject = None
    if retrain:
        from hydra_pipe.cleaning.retraining import opened  # torch takes seconds to import

        subject, seeds = opened(directory, pipeline, seeds)
    with alone(directory, CLEAN.of(method)):
        stage = _Proposal(directory, request, overwrite=overwrite)
        found = stage.proposed(pipeline, progress)
        if given is not None and not given.are_of(found):
            found = stage.written(decided(found, given), progress)
        elif not stage.is_up_to_date(found):
            found = stage.written(found, progress)
        if subject is not None and stage.seeds != seeds:
            found = stage.retrained(subject, found, seeds or 1, memory, progress)
    return found


@dataclass(frozen=True)
class _Request:
    """Options of `clean_run`, by the same names."""

    method: str
    cut: Cut
    rounds: int | None
    decisions: str | os.PathLike[str] | None
    undecided: str | None
    retrain: bool
    seeds: int | None

    def check(self, pipeline: object) -> None:
        """Refuse options that do not go together.

        Raises:
            UsageError: an option needs another one, or a value is not possible.
        """
        method, cut, retrain, seeds = self.method, self.cut, self.retrain, self.seeds
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
                f"--retrain measures accuracy on the run's own tests, and {method} is relevance "
                "for a probe: leave out --retrain"
            )
        if not retrain and seeds is not None:
            raise UsageError("--seeds is for --retrain: add it")
        if not retrain and (self.rounds or 1) < 2 and pipeline is not None:
            raise UsageError("--pipeline is for --retrain and --rounds: add one of them")
        if self.rounds is not None and self.rounds < 1:
            raise UsageError(f"--rounds {self.rounds}: give 1 or more")
        if method != DYNAMICS and self.rounds is not None:
            raise UsageError(
                f"--rounds is for labels judged by dynamics: leave out --method {method}"
            )
        if self.decisions is None and self.undecided is not None:
            raise UsageError("--undecided is for --decisions: add the file")
        if seeds is not None and seeds < 1:
            raise UsageError(f"--seeds {seeds}: give 1 or more")


class _Proposal:
    """The stage of a proposal.

    Args:
        directory: directory of the run, of which no other process writes this stage.
        request: options.
        overwrite: True to make the proposal anew.
    """

    def __init__(self, directory: RunDirectory, request: _Request, *, overwrite: bool) -> None:
        self._directory, self._request, self._overwrite = directory, request, overwrite
        self.stage = CLEAN.of(request.method)
        self._cut, self._rounds = request.cut, request.rounds or 1
        entry = directory.stages.get(self.stage)
        if (
            request.decisions is not None
            and request.cut == Cut()
            and request.rounds is None
            and entry is not None
            and not overwrite
        ):
            # Decisions are about the proposal that is there.
            own = {name: entry.settings.get(name) for name in ("lowest", "threshold")}
            self._cut = Cut(**own, cautious=bool(entry.settings.get("cautious")))
            self._rounds = entry.settings.get(names.ROUNDS) or 1
        cut = self._cut
        self._settings: Settings = {"lowest": cut.lowest}
        if request.method == DYNAMICS:
            self._settings |= {"cautious": cut.cautious}
            self._settings |= {names.ROUNDS: self._rounds} if self._rounds > 1 else {}
        else:
            self._settings |= {"threshold": cut.threshold}

    @property
    def seeds(self) -> object:
        """Number of seeds of the complete stage's retrainings, or None if it has none."""
        return self._directory.stages[self.stage].facts.get(_SEEDS)

    def proposed(self, pipeline: "str | Pipeline | None", progress: Progress) -> Cleaning:
        """Return the stored proposal, or make one.

        Raises:
            RunError: the proposal was made with other settings.
            HydraError: any error of a proposal.
        """
        found = None if self._overwrite else self._existing()
        if found is not None:
            return found
        say_unlisted(self._directory, progress)
        load = None
        if self._rounds > 1:
            from hydra_pipe.cleaning.rounds import loader  # torch takes seconds to import

            load = loader(self._directory, pipeline)
        with self._running() as work:
            found = self._new(load, progress)
            found.summary[_SETTINGS] = self._settings
            source = hurting(self._directory, self._request.method)
            found = with_hurts(self._directory, found, source, progress)
            _write(work, found, carry=not self._overwrite)
        return found

    def _new(self, load: "Callable[[], Pipeline] | None", progress: Progress) -> Cleaning:
        if self._request.method != DYNAMICS:
            return proposed_by_relevance(self._directory, self._request.method, self._cut, progress)
        seen = Seen.of(self._directory)
        found = proposed_by_dynamics(seen, self._cut, progress)
        if load is None:
            return found
        from hydra_pipe.cleaning.rounds import further_rounds

        return further_rounds(
            self._directory, load(), seen, found, self._cut, self._rounds, progress
        )

    def is_up_to_date(self, found: Cleaning) -> bool:
        """Tell whether the stage is complete, and tests are hurt by the present relevance."""
        if HURTS not in found.summary or self._directory.stages[self.stage].state != "complete":
            return False
        told = found.summary[HURTS]
        own = None if told is None else {name: told.get(name) for name in ("method", "checksums")}
        return own == hurting(self._directory, self._request.method)

    def written(self, found: Cleaning, progress: Progress) -> Cleaning:
        """Write a proposal, with the tests that it hurts, and return it. Retrainings stay.

        Raises:
            StoreError: the relevance is damaged.
        """
        source = hurting(self._directory, self._request.method)
        found = with_hurts(self._directory, found, source, progress)
        seeds = (found.summary.get(RETRAINING) or {}).get("seeds")
        with self._running() as work:
            _write(work, found, carry=True)
            work.facts |= {} if seeds is None else {_SEEDS: seeds}
        return found

    def retrained(
        self, subject: "Subject", found: Cleaning, seeds: int, memory: str, progress: Progress
    ) -> Cleaning:
        """Return the proposal with the comparison of retrainings, which is stored.

        Raises:
            HydraError: any error of `compared`.
        """
        from hydra_pipe.cleaning.retraining import Comparison, compared

        options = Comparison(self._request.method, self._cut, seeds, memory)
        with self._running() as work:
            rows, summary = compared(subject, found, options, Retrained(work.place), progress)
            found = replace(
                found,
                is_new=True,
                retraining=rows,
                summary=found.summary | {RETRAINING: summary},
            )
            _write(work, found, carry=True)
            work.facts[_SEEDS] = seeds
        return found

    def _existing(self) -> Cleaning | None:
        """Return the stored proposal, or None if it cannot serve.

        It cannot serve if it is missing, unfinished or damaged, or was made from another
        recording or relevance than is there now.

        Raises:
            RunError: the proposal was made with other settings.
        """
        directory, stage = self._directory, self.stage
        is_interrupted = directory.has_work(stage, self._settings)
        if is_interrupted and stage not in directory.stages:
            return None
        if not is_interrupted and directory.stale(stage):
            return None
        n_samples = directory.n_samples(self.stage.name)
        with suppress(OSError, ValueError, pa.ArrowException):
            found = Cleaning(False, *read_proposal(directory.path / stage.area, n_samples))
            # Retrainings that were interrupted leave the proposal, with the decisions on it.
            own = found.summary.get(_SETTINGS), found.summary.get("run_id")
            if not is_interrupted or own == (self._settings, directory.run_id):
                return found
        return None

    @contextmanager
    def _running(self) -> Iterator[Work]:
        """Run the stage for the length of a block, which ends with `_write`."""
        with running(self._directory, self.stage, self._settings) as work:
            remove_partials(work.place)
            yield work


def _write(work: Work, found: Cleaning, *, carry: bool) -> None:
    """Replace all files of the stage. With `carry`, the stored retrainings stay."""
    with work.replaced() as partial:
        write_proposal(partial, found.keep, found.drop, found.judged, found.summary)
        if found.retraining:
            write_retraining(partial, found.retraining)
        if carry:
            carry_retrained(work.place, partial)
    n_proposed = found.drop.num_rows
    work.facts |= {"n_samples": len(found.keep) + n_proposed, "n_proposed": n_proposed}

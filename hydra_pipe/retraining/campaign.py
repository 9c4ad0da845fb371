"""Many retrainings, in stacks that fit into memory.

Results are kept as they finish, so the same call resumes after an interruption.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import log2

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import BudgetError
from hydra_pipe.progress import Progress
from hydra_pipe.retraining.models import Values
from hydra_pipe.retraining.retrainer import MeanOver, Retrainer
from hydra_pipe.retraining.subject import Subject
from hydra_pipe.store.data.evaluations import Retrained, digest_of
from hydra_pipe.types import Span
from hydra_pipe.units import format_bytes, format_seconds, parse_bytes, resident_bytes

# Most models in a stack. More are not faster, and losing a larger stack to an interruption costs
# more.
MOST_MODELS = 64


@dataclass(frozen=True)
class Retraining:
    """Retrainings to be done.

    Retrainings are counted over all seeds: number s n + i is the i-th of the s-th seed.

    Args:
        n: number of retrainings for each seed.
        weights: function from (first, end) to the weights of the retrainings in the range, shape
            (end - first, sample), float32.
        seeds: seeds, each of which `n` retrainings use. Initial weights are those of the seed.
        mean_over: divisor of the weighted losses, see `Retrainer`.
        classes: function from (first, end) to the classes that replace targets in these
            retrainings, shape (end - first, sample), int32, or None if no target is replaced;
            see `Retrainer.train`. Default: no target is replaced.
    """

    n: int
    weights: Callable[[int, int], NDArray[np.float32]]
    seeds: tuple[int, ...]
    mean_over: MeanOver
    classes: Callable[[int, int], NDArray[np.int32] | None] = lambda first, end: None

    @classmethod
    def without(
        cls,
        n: int,
        left_out: Callable[[int], NDArray[np.int64]],
        n_samples: int,
        seeds: tuple[int, ...],
    ) -> "Retraining":
        """Return retrainings that each leave out some samples.

        Args:
            n: number of retrainings for each seed.
            left_out: function from the number of a retraining, counted over all seeds, to the ids
                of the samples that it leaves out.
            n_samples: number of samples.
            seeds: seeds of the retrainings.
        """

        def weights(first: int, end: int) -> NDArray[np.float32]:
            found = np.ones((end - first, n_samples), np.float32)
            for row, number in zip(found, range(first, end), strict=True):
                row[left_out(number)] = 0.0
            return found

        return cls(n, weights, seeds, "weights")

    def stacks(self, most: int) -> list[Span]:
        """Return the first retraining and the end of each stack, counted over all seeds.

        A stack never mixes seeds.
        """
        width = -(-self.n // -(-self.n // most))  # stacks of nearly equal size
        return [
            (s * self.n + a, s * self.n + min(a + width, self.n))
            for s in range(len(self.seeds))
            for a in range(0, self.n, width)
        ]

    def of(self, span: Span) -> "Stack":
        """Return the retrainings of a stack."""
        return Stack(self.weights(*span), self.classes(*span), self.seeds[span[0] // self.n])

    def digest(self, run_id: str, stack: "Stack") -> str:
        """Return the digest of a stack of retrainings of a run."""
        return digest_of(run_id, stack.weights, stack.seed, self.mean_over, stack.classes)


@dataclass(frozen=True)
class Stack:
    """Retrainings that are made together.

    Args:
        weights: weights of the samples, shape (model, sample).
        classes: classes that replace targets, shape (model, sample). None: no target is replaced.
        seed: seed of all of them.
    """

    weights: NDArray[np.float32]
    classes: NDArray[np.int32] | None
    seed: int


_Done = dict[Span, tuple[str, NDArray[np.float64]]]


def retrain(
    subject: Subject,
    job: Retraining,
    directory: Retrained,
    memory: str,
    progress: Progress,
    *,
    strict: bool = True,
) -> NDArray[np.float64]:
    """Make all retrainings of `job`, and return the resulting test losses and hits.

    See `Campaign` and `Campaign.outcome`.
    """
    campaign = Campaign(subject, job.mean_over, memory, progress, strict=strict)
    return campaign.outcome(job, directory)


class Campaign:
    """Retrainings of a run, made as jobs ask for them.

    Before the first retraining whose result is not kept, the pipeline is trained once with all
    weights 1, and compared with the run.

    Args:
        subject: run and pipeline.
        mean_over: divisor of the weighted losses, the same for all jobs.
        memory: budget of this process, such as "4GiB".
        progress: place to show progress.
        strict: True to refuse a pipeline whose first training does not come to the losses of the
            run. False serves if retrainings are only compared with each other.
    """

    def __init__(
        self,
        subject: Subject,
        mean_over: MeanOver,
        memory: str,
        progress: Progress,
        *,
        strict: bool = True,
    ) -> None:
        self._subject, self._mean_over, self._progress = subject, mean_over, progress
        self._budget, self._strict = parse_bytes(memory), strict

    def outcome(self, job: Retraining, directory: Retrained) -> NDArray[np.float64]:
        """Make all retrainings of `job`, and return the resulting test losses and hits.

        Args:
            job: retrainings to make.
            directory: store of results. Results that are there already are not computed again.

        Returns:
            Loss and hit of each test sample, shape (seed, retraining, 2, test).

        Raises:
            PipelineError: the pipeline is not the one of the run.
            BudgetError: not even one model fits.
            UserCodeError: the model, the loss or a dataset raised.
        """
        assert job.mean_over == self._mean_over, "the retrainer was made for another divisor"
        done = _kept(self._subject, job, directory)
        if done is None:
            done = self._made(job, directory)
        directory.keep_only({span: digest for span, (digest, _) in done.items()})
        found = np.concatenate([done[span][1] for span in sorted(done)])
        return found.reshape(len(job.seeds), job.n, *found.shape[1:])

    @cached_property
    def _checked(self) -> tuple[Retrainer, float]:
        """The retrainer, compared with the run, and the seconds that one training has taken."""
        retrainer = Retrainer(self._subject.pipeline, self._progress, self._mean_over)
        start = time.monotonic()
        self._subject.check(retrainer, self._progress, strict=self._strict)
        return retrainer, time.monotonic() - start

    def _most_models(self, retrainer: Retrainer) -> int:
        """Return how many models fit into a stack.

        It is a power of two, so that another call that finds a little more or less room cuts the
        same stacks. The call then finds these pieces.
        """
        room = self._budget - resident_bytes()
        if room < retrainer.model_bytes:
            raise BudgetError(
                f"a model takes {format_bytes(retrainer.model_bytes)} beside the "
                f"{format_bytes(self._budget - room)} that this process has, "
                f"the budget is {format_bytes(self._budget)}: raise --memory to "
                f"{format_bytes(1.2 * (self._budget - room + retrainer.model_bytes))}"
            )
        return min(MOST_MODELS, 1 << int(log2(room // retrainer.model_bytes)))

    def _made(self, job: Retraining, directory: Retrained) -> _Done:
        subject = self._subject
        retrainer, seconds = self._checked
        stacks = job.stacks(self._most_models(retrainer))
        n = len(job.seeds) * job.n
        if n > 1:
            self._progress.say(
                f"{n:,} retrainings of {retrainer.n_steps:,} steps, {stacks[0][1]} at a time; one "
                f"alone takes {format_seconds(seconds)}, "
                f"all of them {format_seconds(n * seconds)} at most"
            )
        starts: dict[int, Values] = {
            seed: subject.with_seed(seed) for seed in job.seeds if seed != subject.pipeline.seed
        }
        done: _Done = {}
        with self._progress.task("retrain", n * retrainer.n_steps, "steps") as task:
            for span in stacks:
                stack = job.of(span)
                digest = job.digest(subject.run.run_id, stack)
                values = directory.read(span, digest, subject.n_tests)
                if values is None:
                    values = retrainer.train(
                        stack.weights,
                        task,
                        classes=stack.classes,
                        seed=stack.seed,
                        start=starts.get(stack.seed),
                    )
                    directory.write(span, digest, values)
                else:
                    task.advance((span[1] - span[0]) * retrainer.n_steps)
                done[span] = (digest, values)
        return done


def _kept(subject: Subject, job: Retraining, directory: Retrained) -> _Done | None:
    """Return the stored results of all retrainings, or None if some are missing."""
    done: _Done = {}
    end = 0
    for span in directory.spans():
        if (
            span[0] == end
            and span[1] <= len(job.seeds) * job.n
            and span[0] // job.n == (span[1] - 1) // job.n
        ):
            digest = job.digest(subject.run.run_id, job.of(span))
            values = directory.read(span, digest, subject.n_tests)
            if values is not None:
                done[span], end = (digest, values), span[1]
    return done if end == len(job.seeds) * job.n else None

"""How the matrix of hypergradients is filled: a backward sweep of every feature, or a forward sweep of every training sample."""

from contextlib import suppress
from dataclasses import dataclass, replace

from hydra_pipe.errors import BudgetError
from hydra_pipe.plan.geometry import MOST_FEATURES, MOST_SAMPLES, chunk_columns
from hydra_pipe.plan.records import Answered
from hydra_pipe.plan.sweep import SweepInput, SweepPlan, plan_sweep

# dimensions of the matrix, and the words for what is along each
SAMPLES, FEATURES = 0, 1
_NOUNS = ("samples", "features")
# which of the two each sweep fills block by block
ALONG = {"forward": SAMPLES, "backward": FEATURES}


@dataclass(frozen=True, kw_only=True)
class MatrixPlan(SweepPlan):
    """How the matrix is filled. What a sweep carries as columns are features or samples of the matrix.

    Args:
        along: dimension that is filled block by block, `FEATURES` or `SAMPLES`.
        shape: samples and features.
    """

    along: int
    shape: tuple[int, int]

    @property
    def noun(self) -> str:
        return _NOUNS[self.along]

    @property
    def n_columns(self) -> int:
        """Features or samples that are swept in all."""
        return self.shape[self.along]

    @property
    def chunks(self) -> tuple[int, int]:
        """Samples and features of a file: whole files in a block."""
        most = (MOST_SAMPLES, MOST_FEATURES)
        own = chunk_columns(self.columns[0][1], most[self.along])
        across = min(most[1 - self.along], self.shape[1 - self.along])
        return (own, across) if self.along == SAMPLES else (across, own)

    def fills(self, chunks: tuple[int, ...], *, grouped: bool = False) -> bool:
        own, across = chunks[self.along], chunks[1 - self.along]
        most = (MOST_SAMPLES, MOST_FEATURES)
        as_made = own <= most[self.along] and across == self.chunks[1 - self.along]
        return as_made and all(first % own == 0 for first, _ in self.columns)


def of_features(what: SweepInput) -> SweepInput:
    """The sweep of every feature."""
    given = replace(what.recording, n_columns=what.width, n_tests=what.width, grouped=False)
    return replace(what, recording=given, most_chunk=MOST_FEATURES)


def of_samples(what: SweepInput) -> SweepInput:
    """The forward sweep of every training sample."""
    n_samples = what.recording.n_samples
    given = replace(what.recording, n_columns=n_samples, n_tests=n_samples, grouped=False)
    return replace(what, recording=given, n_values=what.width, order="forward", most_chunk=MOST_SAMPLES)


def plan_matrix(what: SweepInput, answered: Answered | None = None) -> MatrixPlan:
    """The cheaper of the two sweeps that fill the matrix, or the one that was begun where it still fits.

    Raises:
        BudgetError: not even one column fits.
    """
    fitting = []
    for way in (of_features(what), of_samples(what)):
        with suppress(BudgetError):
            fitting.append((plan_sweep(way).compared_picoseconds, way))
    begun = [found for found in fitting if answered is not None and found[1].order == answered.order]
    _, way = min(begun or fitting, key=lambda found: found[0], default=(0, of_features(what)))
    plan = plan_sweep(way, answered.done if begun and answered is not None else 0)
    return MatrixPlan(**vars(plan), along=ALONG[way.order], shape=(what.recording.n_samples, what.width))

"""Plan of the matrix of hypergradients.

A backward sweep of every feature or a forward sweep of every training sample fills the matrix.
"""

from contextlib import suppress
from dataclasses import dataclass, replace

from hydra_pipe.errors import BudgetError
from hydra_pipe.plan.chunking import MOST_FEATURES, MOST_SAMPLES, chunk_columns
from hydra_pipe.plan.records import Answered
from hydra_pipe.plan.sweep import SweepInput, SweepPlan, plan_sweep

# Dimensions of the matrix, and the nouns for their entries.
SAMPLES, FEATURES = 0, 1
_NOUNS = ("samples", "features")
# Dimension that each sweep fills block by block.
ALONG = {"forward": SAMPLES, "backward": FEATURES}


@dataclass(frozen=True, kw_only=True)
class MatrixPlan(SweepPlan):
    """Plan of the sweep that fills the matrix. The sweep carries features or samples as columns.

    Args:
        along: dimension that is filled block by block, `FEATURES` or `SAMPLES`.
        shape: samples and features of the matrix.
    """

    along: int
    shape: tuple[int, int]

    @property
    def noun(self) -> str:
        return _NOUNS[self.along]

    @property
    def n_columns(self) -> int:
        """Number of features or samples that are swept in all."""
        return self.shape[self.along]

    @property
    def chunks(self) -> tuple[int, int]:
        """Samples and features of a file. A block has whole files."""
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
    """Return the sweep of every feature."""
    given = replace(what.recording, n_columns=what.width, n_tests=what.width, grouped=False)
    return replace(what, recording=given, most_chunk=MOST_FEATURES)


def of_samples(what: SweepInput) -> SweepInput:
    """Return the forward sweep of every training sample."""
    n_samples = what.recording.n_samples
    given = replace(what.recording, n_columns=n_samples, n_tests=n_samples, grouped=False)
    return replace(
        what, recording=given, n_values=what.width, order="forward", most_chunk=MOST_SAMPLES
    )


def plan_matrix(what: SweepInput, answered: Answered | None = None) -> MatrixPlan:
    """Return the cheaper of the two sweeps that fill the matrix.

    A sweep that was begun is resumed if it still fits.

    Raises:
        BudgetError: not even one column fits.
    """
    fitting = []
    for way in (of_features(what), of_samples(what)):
        with suppress(BudgetError):
            fitting.append((plan_sweep(way).compared_picoseconds, way))
    begun = [
        found for found in fitting if answered is not None and found[1].order == answered.order
    ]
    _, way = min(begun or fitting, key=lambda found: found[0], default=(0, of_features(what)))
    plan = plan_sweep(way, answered.done if begun and answered is not None else 0)
    return MatrixPlan(
        **vars(plan), along=ALONG[way.order], shape=(what.recording.n_samples, what.width)
    )

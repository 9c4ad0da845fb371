"""Treatments of a training set by a proposal: a weight for each sample, and a class in place of the
given one. Arrays in, arrays out.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hydra_pipe.store.data.clean_result import KEEP, RELABEL
from hydra_pipe.types import F32, I64, Bools

# Names of the treatments, as tables and options call them.
DROPPED, RELABELLED, MIXED, WEIGHTED, DECIDED = ("drop", "relabel", "mixed", "weighted", "proposed")
HOW = (DECIDED, DROPPED, RELABELLED, MIXED, WEIGHTED)
# Class of a sample that keeps its target.
AS_GIVEN = -1


@dataclass(frozen=True)
class Treatment:
    """The training set of one training.

    Args:
        weights: weight of each sample, float32, shape (sample,). 0: left out.
        classes: class that replaces each sample's target, int64, shape (sample,). `AS_GIVEN`
            keeps the target.
    """

    weights: F32
    classes: I64

    @classmethod
    def of(cls, n_samples: int) -> "Treatment":
        """Return the training set as given."""
        return cls(np.ones(n_samples, np.float32), np.full(n_samples, AS_GIVEN, np.int64))

    @property
    def n_changed(self) -> float:
        """Number of samples that get another class, and the weight that the others lose."""
        return float((1 - self.weights).sum()) + len(self.relabelled)

    @property
    def relabelled(self) -> I64:
        """Samples that get another class."""
        return np.flatnonzero((self.classes != AS_GIVEN) & (self.weights > 0))


@dataclass(frozen=True)
class Proposed:
    """Proposed samples, and what may be done to them.

    Args:
        n_samples: number of training samples.
        ids: proposed samples, shape (proposed,).
        classes: suggested class of each, shape (proposed,). -1: none.
        sure: flag of each sample that "mixed" relabels; it drops the others. Shape (proposed,).
        acted: flag of each sample that is to be relabelled by its action, shape (proposed,).
        decided: flag of each sample that a person decided on, shape (proposed,).
        weights: weight of each training sample, shape (sample,): one less the chance that its
            label is wrong. None: no chances are known.
    """

    n_samples: int
    ids: I64
    classes: I64
    sure: Bools
    acted: Bools
    decided: Bools
    weights: F32 | None

    @classmethod
    def of(cls, drop: pa.Table, judged: pa.Table, n_samples: int) -> "Proposed":
        """Read the tables of a proposal."""
        classes = drop.column("suggested_class").fill_null(AS_GIVEN).to_numpy()
        acted = np.array(drop.column("action").to_pylist(), object) == RELABEL
        sure = (
            drop.column("suggested_chance").fill_null(1.0).to_numpy() > 0.5
            if "suggested_chance" in drop.column_names
            else classes != AS_GIVEN
        )
        ids = drop.column("train_id").to_numpy()
        decided = drop.column("decided").to_numpy()
        weights = _weights(judged, n_samples)
        if weights is not None:
            spared = judged.filter(pc.not_equal(judged.column("action"), KEEP)).column("train_id")
            weights[np.setdiff1d(spared.to_numpy(), ids)] = 1.0
            weights[ids[decided]] = acted[decided]
        return cls(n_samples, ids, classes, sure, acted, decided, weights)

    def treated(self, how: str) -> Treatment:
        """Return the training set of a treatment.

        Args:
            how: name of the treatment, one of `HOW`. "weighted" needs weights.
        """
        found = Treatment.of(self.n_samples)
        if how == WEIGHTED:
            assert self.weights is not None, "only a proposal with chances has weights"
            by_person = self.decided & self.acted
            found.classes[self.ids[by_person]] = self.classes[by_person]
            return Treatment(self.weights, found.classes)
        has_class = self.classes != AS_GIVEN
        relabelled = (
            has_class
            & {
                DROPPED: np.zeros(len(self.ids), bool),
                RELABELLED: has_class,
                MIXED: self.sure,
                DECIDED: self.acted,
            }[how]
        )
        found.classes[self.ids[relabelled]] = self.classes[relabelled]
        if how != RELABELLED:
            found.weights[self.ids[~relabelled]] = 0.0
        return found


def _weights(judged: pa.Table, n_samples: int) -> F32 | None:
    """Return one less the chance of each sample that its label is wrong. None: not known."""
    if "chance" not in judged.column_names:
        return None
    found = np.ones(n_samples, np.float32)
    found[judged.column("train_id").to_numpy()] = 1 - judged.column("chance").to_numpy()
    return found


def at_random(treatment: Treatment, given: I64 | None, rng: np.random.Generator) -> Treatment:
    """Return the same treatment of as many other samples, drawn at random.

    As many samples get no weight. Samples that get another class are drawn among those with the
    same given class, so that as many go from each class to each other one. Other weights are
    permuted.

    Args:
        treatment: the treatment.
        given: class that each sample was trained with, shape (sample,). None: not needed, since
            no sample gets another class.
        rng: generator of the draws.
    """
    n_samples = len(treatment.weights)
    if ((treatment.weights > 0) & (treatment.weights < 1)).any():
        return Treatment(rng.permutation(treatment.weights), treatment.classes)
    found = Treatment.of(n_samples)
    relabelled = treatment.relabelled
    if len(relabelled):
        assert given is not None, "another class replaces a known one"
        for own in np.unique(given[relabelled]):
            of_class = relabelled[given[relabelled] == own]
            drawn = rng.permutation(np.flatnonzero(given == own))[: len(of_class)]
            found.classes[drawn] = treatment.classes[of_class]
    left = np.flatnonzero(found.classes == AS_GIVEN)
    n_dropped = int((treatment.weights == 0).sum())
    found.weights[rng.permutation(left)[:n_dropped]] = 0.0
    return found

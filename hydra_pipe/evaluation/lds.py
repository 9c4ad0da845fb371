"""The linear datamodelling score: relevance summed over a subset as a prediction of losses.

The question is whether the sum tells how training on that subset comes out. Ilyas et al.,
"Datamodels", ICML 2022, and Park et al., "TRAK", ICML 2023, train on random halves. Ilyas and
Engstrom, "MAGIC", 2025, drop 1 % of the samples or 5 %.

"Trained on a subset" means here that the other samples have weight 0 in the batches of the run.
The loss of a batch is the mean over the samples that are kept. So the model takes the same steps
at the same learning rate, on less data.

A mean over the whole batch would make each step about half as long, and the model would be
trained half as far. Its losses would then depend on how many kept samples each batch happens to
have, more than on which samples are kept.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import NonFiniteError
from hydra_pipe.evaluation.evaluator import EvaluationRequest, Evaluator
from hydra_pipe.evaluation.kinds import Options
from hydra_pipe.evaluation.result import Result, Row, bars
from hydra_pipe.evaluation.subsets import n_dropped, random_weights
from hydra_pipe.maths.rank_statistics import spearmans
from hydra_pipe.maths.two_way import residual_variance, share_of_variance
from hydra_pipe.progress import Progress
from hydra_pipe.retraining.campaign import Retraining, retrain
from hydra_pipe.retraining.intervals import INTERVAL, with_interval
from hydra_pipe.retraining.retrainer import LOSS
from hydra_pipe.retraining.subject import Relevance, Subject
from hydra_pipe.types import Bools

DEFAULT_RETRAININGS = 100
DEFAULT_DROP = 0.5
# Seed of the random subsets.
_SEED = 0x6C6473
_FEWEST = 3
# Columns of the table: the score by the run's own seed, and by the mean over other seeds.
_OWN, _OTHERS = "lds", "lds_other_seeds"
# Share of each score's spread over subsets that is noise of training.
_NOISE = {_OWN: "noise", _OTHERS: "noise_other_seeds"}


def half(index: int, n_samples: int, seed: int = _SEED) -> NDArray[np.float32]:
    """Return the weights of a random half, shape (sample,).

    The weight is 1 for the floor(n / 2) samples that are kept, and 0 for the others.
    """
    return random_weights(index, n_samples, n_samples - n_samples // 2, seed)


class DatamodelScore(Evaluator):
    """Score every method.

    For each of some random subsets S, relevance predicts the loss of test sample j after training
    on S. The larger the sum over i in S of R(i, j), the lower is the predicted loss. The score
    is Spearman's correlation of prediction and loss over the subsets, mean over test samples. The
    losses are those of training with the run's own seed. With several seeds there is a second
    score, by the mean loss over the others: does relevance tell of training in general?

    With several seeds it is also known how much of the losses' variance over the subsets is noise
    of training. A training with the same seed is the same to the last bit, so one seed alone
    cannot tell.
    """

    def settings(self, subject: Subject, options: Options, progress: Progress) -> dict[str, Any]:
        """Return the numbers of subsets and of seeds, and the share to drop if it is not a half."""
        seeds = options.seeds or 1
        if seeds > 1:
            subject.check_seeds()
        drop = DEFAULT_DROP if options.drop is None else options.drop
        n_dropped(drop, subject.n_samples)
        own = {"retrainings": options.retrainings or DEFAULT_RETRAININGS, "seeds": seeds}
        return own if drop == DEFAULT_DROP else own | {"drop": drop}

    def scored(
        self, subject: Subject, methods: str | None, settings: Mapping[str, Any]
    ) -> Mapping[str, Relevance]:
        """Return relevance for each test sample, at least one result."""
        return subject.required_relevance(methods)

    def evaluate(self, request: EvaluationRequest) -> Result:
        """Train on random subsets and score every method; see the class.

        Raises:
            NonFiniteError: nearly all retrainings diverged.
        """
        subject, settings = request.subject, request.settings
        retrainings, seeds = settings["retrainings"], settings["seeds"]
        relevance = subject.required_relevance(request.methods)
        n = subject.n_samples
        n_left_out = n_dropped(settings.get("drop", DEFAULT_DROP), n)

        def weights(first: int, end: int) -> NDArray[np.float32]:
            return np.stack(
                [
                    random_weights(index % retrainings, n, n_left_out, _SEED)
                    for index in range(first, end)
                ]
            )

        own = subject.pipeline.seed
        job = Retraining(retrainings, weights, tuple(own + s for s in range(seeds)), "weights")
        losses = retrain(subject, job, request.retrained, request.memory, request.progress)[
            :, :, LOSS
        ]
        finite: Bools = np.logical_and.reduce(np.isfinite(losses), axis=(0, 2))
        if finite.sum() < _FEWEST:
            raise NonFiniteError(
                f"{(~finite).sum()} of {retrainings} retrainings diverged: this training is too "
                "unstable to score"
            )
        losses = losses[:, finite]
        targets = {_OWN: losses[0]}
        if seeds > 1:
            targets[_OTHERS] = losses[1:].mean(axis=0)
        kept = weights(0, retrainings)[finite].astype(np.float64)
        rows = _rows(relevance, kept, targets)
        says = [_says(int(finite.sum()), n_left_out, n, settings), *_diverged(finite)]
        if seeds > 1:
            says.append(
                f"{_OWN}: training with the run's own seed; {_OTHERS}: mean over {seeds - 1} other "
                "seeds, which tells of training in general"
            )
        noise = _noise(losses, targets)
        says += _spread_in_words(losses[0], noise, seeds, is_told="drop" in settings)
        summary = {
            "retrainings": retrainings,
            "seeds": seeds,
            "left_out": n_left_out,
            "diverged": int((~finite).sum()),
            "n_tests": subject.n_tests,
            "spread": float(np.median(losses[0].std(axis=0, ddof=1))),
        }
        return Result(rows, summary | noise, says, bars(rows, _OWN, "linear datamodelling score"))


def _rows(
    relevance: Mapping[str, Relevance],
    kept: NDArray[np.float64],
    targets: Mapping[str, NDArray[np.float64]],
) -> list[Row]:
    """Return a row for each method, the best one first.

    Args:
        relevance: relevance by name.
        kept: 1 for each sample of a subset, else 0, shape (subset, sample).
        targets: losses that are predicted, by the name of the score, each (subset, test).
    """
    rows: list[Row] = []
    for name, found in relevance.items():
        predicted, row = -(kept @ found.values()), Row({"method": name})
        for target, of_subsets in targets.items():
            row |= with_interval(target, spearmans(predicted, of_subsets))
        rows.append(row)
    return sorted(rows, key=lambda row: -row[_OWN])


def _says(n_retrainings: int, n_left_out: int, n: int, settings: Mapping[str, Any]) -> str:
    """Return a line on what was trained, and on what the score is."""
    which = (
        f"without {n_left_out:,} of {n:,} samples at random (weight 0, mean over those kept)"
        if "drop" in settings
        else "on random halves (weight 0, mean over those kept)"
    )
    return f"lds: Spearman over {n_retrainings} retrainings {which}, {INTERVAL}"


def _noise(
    losses: NDArray[np.float64], targets: Mapping[str, NDArray[np.float64]]
) -> dict[str, Any]:
    """Return the share of noise in the variance of each target over subsets, with its interval.

    Args:
        losses: loss of each seed and subset, shape (seed, subset, test).
        targets: losses that are predicted, by the name of the score, each (subset, test).

    Returns:
        Nothing if there is one seed.
    """
    n_others = len(losses) - 1
    if not n_others:
        return {}
    variance, found = residual_variance(losses), dict[str, Any]()
    for score, n_averaged in ((_OWN, 1), (_OTHERS, n_others)):
        shares = share_of_variance(variance / n_averaged, targets[score])
        found |= {
            # JSON has no number for a bound that is unknown.
            name: value if np.isfinite(value) else None
            for name, value in with_interval(_NOISE[score], shares).items()
        }
    return found


def _spread_in_words(
    own: NDArray[np.float64], noise: Mapping[str, Any], seeds: int, *, is_told: bool
) -> list[str]:
    """Return lines on the size of what is predicted, and on how much of it is noise.

    Args:
        own: losses by the run's own seed, shape (subset, test).
        noise: result of `_noise`.
        seeds: number of seeds.
        is_told: True to say also what one seed cannot tell.
    """
    spread, size = (float(np.median(v)) for v in (own.std(axis=0, ddof=1), np.abs(own).mean(0)))
    says = []
    if noise:
        at_best, other = (max(0.0, 1.0 - noise[_NOISE[s]]) ** 0.5 for s in (_OTHERS, _OWN))
        says = [
            f"noise of training: {noise[_NOISE[_OWN]]:.0%} of the variance over subsets with the "
            f"run's own seed is of this seed alone, and {noise[_NOISE[_OTHERS]]:.0%} of the "
            f"variance of the mean over {seeds - 1} other seeds (mean over test samples); what "
            f"tells of all seeds alike correlates with the first up to about {other:.2f}, with the "
            f"second up to about {at_best:.2f}"
        ]
    elif is_told:
        says = [
            "noise of training: unknown with one seed, whose trainings are the same each time; "
            "--seeds 3 tells how much of the spread another seed would not have"
        ]
    if says:
        says.insert(
            0,
            f"spread of a test's loss over subsets: {spread:.2g}, of a loss of {size:.2g} (medians "
            "over test samples)",
        )
    return says


def _diverged(finite: NDArray[np.bool_]) -> list[str]:
    return [] if finite.all() else [f"{(~finite).sum()} retrainings diverged, and are left out"]

"""The linear datamodelling score: relevance summed over half the data as a prediction of losses.

The question is whether the sum tells how training on that half comes out. Ilyas et al.,
"Datamodels", ICML 2022, and Park et al., "TRAK", ICML 2023.

"Trained on a half" means here that the other samples have weight 0 in the batches of the run.
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
from hydra_pipe.maths.rank_statistics import spearmans
from hydra_pipe.progress import Progress
from hydra_pipe.retraining.campaign import Retraining, retrain
from hydra_pipe.retraining.intervals import INTERVAL, with_interval
from hydra_pipe.retraining.retrainer import LOSS
from hydra_pipe.retraining.subject import Relevance, Subject
from hydra_pipe.types import Bools

DEFAULT_RETRAININGS = 100
# Seed of the random halves.
_SEED = 0x6C6473
_FEWEST = 3
# Columns of the table: the score by the run's own seed, and by the mean over other seeds.
_OWN, _OTHERS = "lds", "lds_other_seeds"


def half(index: int, n_samples: int, seed: int = _SEED) -> NDArray[np.float32]:
    """Return the weights of a random half, shape (sample,).

    The weight is 1 for the floor(n / 2) samples that are kept, and 0 for the others.
    """
    weights = np.zeros(n_samples, np.float32)
    weights[np.random.default_rng([seed, index]).permutation(n_samples)[: n_samples // 2]] = 1.0
    return weights


class DatamodelScore(Evaluator):
    """Score every method.

    For each of some random halves H, relevance predicts the loss of test sample j after training
    on H. The larger the sum over i in H of R(i, j), the lower is the predicted loss. The score
    is Spearman's correlation of prediction and loss over the halves, mean over test samples. The
    losses are those of training with the run's own seed. With several seeds there is a second
    score, by the mean loss over the others: does relevance tell of training in general?
    """

    def settings(self, subject: Subject, options: Options, progress: Progress) -> dict[str, Any]:
        """Return the numbers of halves and of seeds."""
        seeds = options.seeds or 1
        if seeds > 1:
            subject.check_seeds()
        return {"retrainings": options.retrainings or DEFAULT_RETRAININGS, "seeds": seeds}

    def scored(self, subject: Subject, methods: str | None) -> Mapping[str, Relevance]:
        """Return relevance for each test sample, at least one result."""
        return subject.required_relevance(methods)

    def evaluate(self, request: EvaluationRequest) -> Result:
        """Train on random halves and score every method; see the class.

        Raises:
            NonFiniteError: nearly all retrainings diverged.
        """
        subject, retrainings, seeds = (
            request.subject,
            request.settings["retrainings"],
            request.settings["seeds"],
        )
        relevance = subject.required_relevance(request.methods)
        n = subject.n_samples

        def weights(first: int, end: int) -> NDArray[np.float32]:
            return np.stack([half(index % retrainings, n) for index in range(first, end)])

        own = subject.pipeline.seed
        job = Retraining(retrainings, weights, tuple(own + s for s in range(seeds)), "weights")
        losses = retrain(subject, job, request.retrained, request.memory, request.progress)[
            :, :, LOSS
        ]
        targets = {_OWN: losses[0]}
        if seeds > 1:
            targets[_OTHERS] = losses[1:].mean(axis=0)
        finite: Bools = np.logical_and.reduce(np.isfinite(losses), axis=(0, 2))
        if finite.sum() < _FEWEST:
            raise NonFiniteError(
                f"{(~finite).sum()} of {retrainings} retrainings diverged: this training is too "
                "unstable to score"
            )
        kept = weights(0, retrainings)[finite].astype(np.float64)
        rows: list[Row] = []
        for name, found in relevance.items():
            predicted, row = -(kept @ found.values()), Row({"method": name})
            for target, of_halves in targets.items():
                row |= with_interval(target, spearmans(predicted, of_halves[finite]))
            rows.append(row)
        rows.sort(key=lambda row: -row[_OWN])
        says = [
            f"lds: Spearman over {finite.sum()} retrainings on random halves (weight 0, mean "
            f"over those kept), {INTERVAL}",
            *_diverged(finite),
        ]
        if seeds > 1:
            says.append(
                f"{_OWN}: training with the run's own seed; {_OTHERS}: mean over {seeds - 1} other "
                "seeds, which tells of training in general"
            )
        summary = {
            "retrainings": retrainings,
            "seeds": seeds,
            "diverged": int((~finite).sum()),
            "n_tests": subject.n_tests,
        }
        return Result(rows, summary, says, bars(rows, _OWN, "linear datamodelling score"))


def _diverged(finite: NDArray[np.bool_]) -> list[str]:
    return [] if finite.all() else [f"{(~finite).sum()} retrainings diverged, and are left out"]

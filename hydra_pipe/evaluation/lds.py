"""The linear datamodelling score: does relevance, summed over a half of the data, tell how training on that half comes out?

Ilyas et al., "Datamodels", ICML 2022, and Park et al., "TRAK", ICML 2023. "Trained on a half" means here that the other samples
have weight 0 in the batches of the run, and that the loss of a batch is the mean over those that are kept: the same steps at the
same learning rate, on less data. With the mean over the whole batch each step would be about half as long: the model would be
trained half as far, and its losses tell of how many of the kept samples each batch happens to have, more than of which they are.
"""

import numpy as np
from numpy.typing import NDArray

from hydra_pipe.errors import NonFiniteError
from hydra_pipe.evaluation.campaign import Job, retrain
from hydra_pipe.evaluation.result import INTERVAL, Result, Row, bars, with_interval
from hydra_pipe.evaluation.retraining import LOSS, MeanOver
from hydra_pipe.evaluation.subject import Subject
from hydra_pipe.maths.ranks import spearmans
from hydra_pipe.progress import Progress
from hydra_pipe.store.evaluations import Retrained

# of the halves
_SEED = 0x6C6473
_FEWEST = 3


def half(index: int, n_samples: int, seed: int = _SEED) -> NDArray[np.float32]:
    """Weights of a random half: 1 for the floor(n / 2) samples that are kept, 0 for the others. Shape (sample,)."""
    weights = np.zeros(n_samples, np.float32)
    weights[np.random.default_rng([seed, index]).permutation(n_samples)[: n_samples // 2]] = 1.0
    return weights


def lds(
    subject: Subject,
    directory: Retrained,
    progress: Progress,
    *,
    retrainings: int,
    seeds: int,
    methods: str | None,
    memory: str,
    mean_over: MeanOver = "weights",
) -> Result:
    """Score every method.

    For each of `retrainings` random halves H the loss of test sample j after training on H is predicted to be lower, the larger
    sum over i in H of R(i, j). The score is Spearman's correlation of prediction and loss over the halves, mean over test samples.

    Args:
        subject: what is evaluated.
        directory: of retrainings.
        progress: where to show progress.
        retrainings: random halves.
        seeds: initial weights and orders for each half, over which its losses are averaged; the run's own is the first.
        methods: see `Subject.relevance`.
        memory: see `retrain`.
        mean_over: see `Retrainer`.

    Raises:
        NonFiniteError: nearly all retrainings diverged.
        HydraError: see `retrain` and `Subject`.
    """
    relevance = subject.required_relevance(methods)
    n = subject.n_samples

    def weights(first: int, end: int) -> NDArray[np.float32]:
        return np.stack([half(index, n) for index in range(first, end)])

    own = subject.pipeline.seed
    job = Job(retrainings, weights, tuple(own + s for s in range(seeds)), mean_over)
    losses = retrain(subject, job, directory, memory, progress)[:, :, LOSS].mean(axis=0)
    finite = np.isfinite(losses).all(axis=1)
    if finite.sum() < _FEWEST:
        raise NonFiniteError(
            f"{(~finite).sum()} of {retrainings} retrainings diverged: nothing can be told of a training as unstable as this"
        )
    kept = weights(0, retrainings)[finite].astype(np.float64)
    rows: list[Row] = []
    for name, found in relevance.items():
        per_test = spearmans(-(kept @ found.values()), losses[finite])
        rows.append({"method": name} | with_interval("lds", per_test))
    rows.sort(key=lambda row: -row["lds"])
    says = [
        f"lds: Spearman over {finite.sum()} retrainings on random halves (weight 0, mean over those kept), {INTERVAL}",
        *_diverged(finite),
    ]
    summary = {"retrainings": retrainings, "seeds": seeds, "diverged": int((~finite).sum()), "n_tests": subject.n_tests}
    return Result(rows, summary, says, bars(rows, "lds", "linear datamodelling score"))


def _diverged(finite: NDArray[np.bool_]) -> list[str]:
    return [] if finite.all() else [f"{(~finite).sum()} retrainings diverged, and are left out"]

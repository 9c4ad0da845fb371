"""Factors of the steps of NAdam and RAdam, by the number t of the update, counted from 1.

NAdam (Dozat 2016) has mu_s = beta1 (1 - 0.96^(s psi) / 2) and pi_t = mu_1 ... mu_t. It moves theta
by - eta D_t (A_t G + B_t m_t), where

    m_t = beta1 m_(t-1) + (1 - beta1) G,   A_t = (1 - mu_t) / (1 - pi_t),
    B_t = mu_(t+1) / (1 - pi_(t+1))

Nesterov's form moves theta by - eta A_t (G + mu v_t), v_t = mu v_(t-1) + (1 - tau) G. The two are
the same for v_t = k_t m_t with k_t^2 = k_(t-1) B_t / (A_t beta1) and k_0 = 1. Then mu is
beta1 k_t / k_(t-1), and 1 - tau is (1 - beta1) k_t.

RAdam (Liu et al. 2020) multiplies Adam's step by r_t, once the length rho_t of the second moment's
average is above 5. Steps before have no preconditioner.
"""

from functools import lru_cache

# A product of factors below 1 that is smaller than half a unit of rounding is no part of 1 - pi.
_NO_PART = 2.0**-54
# k_t depends on the ratio of n updates before by the power 2^-n: a float64 shows no more of them.
_REMEMBERED = 60


def _mu(t: int, beta1: float, momentum_decay: float) -> float:
    return float(beta1 * (1.0 - 0.5 * 0.96 ** (t * momentum_decay)))


@lru_cache(maxsize=2**12)
def nadam_shares(t: int, beta1: float, momentum_decay: float) -> tuple[float, float]:
    """Return A_t and B_t, the factors of the gradient and of the first moment."""
    product = 1.0
    for s in range(1, t + 1):
        product *= _mu(s, beta1, momentum_decay)
        if product < _NO_PART:
            break
    mu, following = (_mu(s, beta1, momentum_decay) for s in (t, t + 1))
    return (1.0 - mu) / (1.0 - product), following / (1.0 - product * following)


@lru_cache(maxsize=2**12)
def nadam_pace(t: int, beta1: float, momentum_decay: float) -> float:
    """Return k_t, the factor between the momentum buffer of Nesterov's form and the first moment.

    Args:
        t: number of the update; 0 before the first one.
        beta1, momentum_decay: beta1, above 0, and psi.
    """
    pace = 1.0
    for s in range(max(1, t - _REMEMBERED), t + 1):
        of_gradient, of_moment = nadam_shares(s, beta1, momentum_decay)
        pace = (pace * of_moment / (of_gradient * beta1)) ** 0.5
    return pace


def radam_rectification(t: int, beta2: float) -> float | None:
    """Return r_t; None if update t has no preconditioner."""
    longest = 2.0 / (1.0 - beta2) - 1.0
    length = longest - 2.0 * t * beta2**t / (1.0 - beta2**t)
    if length <= 5.0:
        return None
    numerator = (length - 4.0) * (length - 2.0) * longest
    return float((numerator / ((longest - 4.0) * (longest - 2.0) * length)) ** 0.5)

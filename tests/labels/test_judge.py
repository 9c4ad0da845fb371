"""The verdict on made-up trainings whose wrong labels are known."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from support.dynamics import made, made_of_many, permuted, renamed

from hydra_pipe.errors import DataError
from hydra_pipe.labels import Dynamics, TopLogits, Verdict, judge
from hydra_pipe.labels.transition import fit, halfway, log_odds
from hydra_pipe.labels.views import RidgeSideBySide, VotesOver, heaviest, predictions
from hydra_pipe.maths.rank_statistics import roc_auc


def f1(verdict: Verdict, wrong: np.ndarray) -> float:
    hits = wrong[verdict.proposed].sum()
    return float(2 * hits / (verdict.n_proposed + wrong.sum()))


@pytest.mark.parametrize(("classes", "seed"), [(2, 0), (4, 0), (4, 1), (10, 0)])
def test_wrong_labels_are_found_and_put_right(classes: int, seed: int) -> None:
    dynamics, truth = made(n=120 * classes, classes=classes, seed=seed)
    wrong = dynamics.labels != truth
    verdict = judge(dynamics)
    assert roc_auc(verdict.score, wrong) > 0.95
    assert f1(verdict, wrong) > 0.75
    assert (verdict.suggested == truth)[wrong].mean() > 0.85


def test_the_score_is_that_of_all_views_and_the_chance_falls_with_it() -> None:
    dynamics, _ = made()
    verdict = judge(dynamics)
    seen = verdict.evidence
    many = heaviest(seen.weights.weight, 5)
    p = predictions(dynamics, seen.weights.weight)
    r, (v,) = RidgeSideBySide(dynamics, many).chances(), VotesOver(dynamics, [many]).chances()
    mean = np.log((p + r + v) / 3)
    rows = np.arange(len(p))
    for view, chances in ((seen.predictions, p), (seen.ridge, r), (seen.votes, v)):
        assert view is not None
        assert np.allclose(view.given, chances[rows, dynamics.labels])
        assert np.allclose(view.suggested, chances[rows, verdict.suggested])
    score, suggested = log_odds(halfway(seen.model), mean, dynamics.labels)
    assert np.allclose(verdict.score, score)
    assert (verdict.suggested == suggested).all()
    assert (np.diff(verdict.score[verdict.order]) <= 0).all()
    assert (np.diff(verdict.chance[verdict.order]) <= 0).all()
    assert verdict.precision == pytest.approx(verdict.chance[verdict.proposed].mean())


def test_the_noise_and_the_chances_are_those_of_the_epochs_that_have_memorised_least() -> None:
    dynamics, _ = made()
    verdict = judge(dynamics)
    few = heaviest(verdict.evidence.weights.unmemorised, 2)
    (votes,) = VotesOver(dynamics, [few]).chances()
    log_q = np.log((RidgeSideBySide(dynamics, few).chances() + votes) / 2)
    model = fit(log_q, dynamics.labels)
    assert np.allclose(verdict.evidence.model.transition, model.transition)
    score, _ = log_odds(model, log_q, dynamics.labels)
    assert np.allclose(np.sort(verdict.chance), np.sort(1 / (1 + np.exp(-score))))
    assert verdict.n_wrong.value == pytest.approx(verdict.chance.sum())


def test_wrong_labels_are_counted_before_the_network_knows_them() -> None:
    dynamics, truth = made(epochs=12)
    assert dynamics.inputs is not None
    inputs = dynamics.inputs.copy()
    inputs[4:, :, :4] += 3 * np.eye(4, dtype=np.float16)[dynamics.labels]
    verdict = judge(replace(dynamics, inputs=inputs))
    n_wrong = int((dynamics.labels != truth).sum())
    assert verdict.evidence.weights.memorised[-1] > 0.5
    assert verdict.n_wrong.value == pytest.approx(n_wrong, rel=0.25)
    assert verdict.n_wrong.low <= n_wrong <= verdict.n_wrong.high


def test_few_labels_are_proposed_where_none_is_wrong() -> None:
    dynamics, _ = made(n=600, noise=0.0)
    assert judge(dynamics).n_proposed <= 0.04 * 600


def test_fewer_labels_are_proposed_with_caution() -> None:
    dynamics, _ = made()
    verdict = judge(dynamics)
    assert 0 < verdict.n_cautious <= verdict.n_proposed


def test_samples_in_another_order_get_the_same_verdict() -> None:
    dynamics, _ = made()
    order = np.random.default_rng(1).permutation(len(dynamics.labels))
    one, other = judge(dynamics), judge(permuted(dynamics, order))
    assert np.allclose(other.score, one.score[order], atol=1e-3)
    assert (other.suggested == one.suggested[order]).mean() > 0.99
    assert abs(other.n_proposed - one.n_proposed) <= 1


def test_other_names_of_the_classes_give_the_same_verdict() -> None:
    dynamics, _ = made()
    names = np.array([2, 0, 3, 1])
    one, other = judge(dynamics), judge(renamed(dynamics, names))
    assert np.allclose(other.score, one.score, atol=1e-3)
    assert (other.suggested == names[one.suggested]).mean() > 0.99


def test_a_constant_added_to_the_logits_changes_nothing() -> None:
    dynamics, _ = made()
    assert isinstance(dynamics.logits, np.ndarray)
    more = dynamics.logits + np.linspace(-5, 5, len(dynamics.labels))[:, None].astype(np.float32)
    assert np.allclose(
        judge(replace(dynamics, logits=more)).score, judge(dynamics).score, atol=1e-2
    )


def test_without_inputs_the_logits_stand_in_and_the_verdict_says_so() -> None:
    dynamics, truth = made()
    verdict = judge(replace(dynamics, inputs=None))
    assert roc_auc(verdict.score, dynamics.labels != truth) > 0.9
    logits = np.asarray(dynamics.logits)
    centred = logits - logits.mean(axis=2, keepdims=True)
    assert np.allclose(verdict.score, judge(replace(dynamics, inputs=centred)).score, atol=1e-6)
    assert any("the logits stand in" in w for w in verdict.warnings)


def test_with_few_logits_and_no_inputs_the_predictions_judge_alone() -> None:
    dynamics, truth = made()
    verdict = judge(replace(dynamics, logits=kept_of(dynamics, 2), inputs=None))
    assert roc_auc(verdict.score, dynamics.labels != truth) > 0.9
    assert verdict.evidence.ridge is None
    assert verdict.evidence.votes is None
    assert any("only the network's own predictions" in w for w in verdict.warnings)


def test_a_sample_without_a_visit_is_judged_by_its_label_alone() -> None:
    dynamics, _ = made()
    assert isinstance(dynamics.logits, np.ndarray)
    assert dynamics.inputs is not None
    logits, inputs = dynamics.logits.copy(), dynamics.inputs.copy()
    logits[:, 5], inputs[:, 5] = np.nan, np.nan
    logits[2, 9], inputs[2, 9] = np.nan, np.nan
    verdict = judge(replace(dynamics, logits=logits, inputs=inputs))
    assert np.isfinite(verdict.score).all()
    assert 5 not in verdict.proposed
    whole = judge(dynamics)
    assert np.corrcoef(np.delete(verdict.score, 5), np.delete(whole.score, 5))[0, 1] > 0.99


def test_one_epoch_is_enough_for_a_verdict() -> None:
    dynamics, truth = made()
    assert dynamics.inputs is not None
    last = Dynamics(dynamics.labels, np.asarray(dynamics.logits)[3:4], dynamics.inputs[3:4])
    assert roc_auc(judge(last).score, dynamics.labels != truth) > 0.9


def test_nothing_is_proposed_if_all_labels_are_the_same() -> None:
    dynamics, _ = made(n=60, noise=0.0)
    verdict = judge(replace(dynamics, labels=np.zeros(60, np.int64)))
    assert np.isfinite(verdict.score).all()
    assert verdict.n_proposed == 0
    assert any("all labels are the same" in w for w in verdict.warnings)


def test_one_class_is_refused() -> None:
    with pytest.raises(DataError, match="1 class: there is no other class to suggest"):
        judge(Dynamics(np.zeros(4, np.int64), np.zeros((2, 4, 1))))


def kept_of(dynamics: Dynamics, count: int) -> TopLogits:
    """The given label's logit, the `count` largest ones and the sum of all."""
    z = np.asarray(dynamics.logits, np.float64)
    classes = np.argsort(-z, axis=2)[:, :, :count]
    own = np.take_along_axis(z, dynamics.labels[None, :, None], 2)[:, :, 0]
    largest = np.take_along_axis(z, classes, 2)
    return TopLogits(own, largest, classes, np.log(np.exp(z).sum(axis=2)), z.shape[2])


def test_kept_logits_of_many_classes_find_wrong_labels_too() -> None:
    dynamics, truth = made(n=700, classes=70, noise=0.1)
    verdict = judge(replace(dynamics, logits=kept_of(dynamics, 8)))
    assert roc_auc(verdict.score, dynamics.labels != truth) > 0.9


def test_a_network_that_has_hardly_learnt_is_warned_of() -> None:
    dynamics, _ = made(epochs=1)
    assert any("hardly learnt" in w for w in judge(dynamics).warnings)


def test_two_unbalanced_classes_are_warned_of() -> None:
    dynamics, _ = made(classes=2, noise=0.0)
    rare = np.flatnonzero(dynamics.labels == 1)[60:]
    kept = np.setdiff1d(np.arange(len(dynamics.labels)), rare)
    assert any("two classes" in w for w in judge(permuted(dynamics, kept)).warnings)
    assert not any("two classes" in w for w in judge(dynamics).warnings)


def test_many_samples_that_agree_bring_no_warning() -> None:
    assert judge(made()[0]).warnings == ()


def test_rare_classes_and_unbalanced_ones_are_named() -> None:
    rng = np.random.default_rng(0)

    def warned(*counts: int) -> str:
        labels = np.repeat(np.arange(len(counts)), counts)
        z = np.eye(len(counts))[labels] * 3 + rng.normal(size=(3, len(labels), len(counts)))
        return " ".join(judge(Dynamics(labels, z.astype(np.float32))).warnings)

    assert "1 of 3 classes have fewer than 10 samples (the rarest 2)" in warned(100, 100, 2)
    assert "unbalanced: the rarest has 12 of 812 samples" in warned(400, 400, 12)
    assert "classes" not in warned(100, 100, 80)
    assert "two classes, and the rarer one has 20 of 120" in warned(100, 20)


def test_blocks_and_drawn_samples_give_about_the_same_verdict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dynamics, _ = made(n=600)
    whole = judge(dynamics)
    monkeypatch.setattr("hydra_pipe.labels.dynamics.CHANCES_AT_ONCE", 1000)
    blocks = judge(dynamics)
    assert np.allclose(blocks.score, whole.score)
    assert np.allclose(blocks.chance, whole.chance)
    monkeypatch.setattr("hydra_pipe.labels.judging._KEPT", 0)
    assert np.allclose(judge(dynamics).score, whole.score)
    monkeypatch.setattr("hydra_pipe.labels.transition.MOST_FITTED", 450)
    drawn = judge(dynamics)
    assert np.corrcoef(drawn.score, whole.score)[0, 1] > 0.99
    assert drawn.n_wrong.value == pytest.approx(whole.n_wrong.value, rel=0.1)


def test_the_chances_of_all_classes_are_never_held_for_all_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The chances of all classes for all samples would be 16 MB an array; there were a dozen."""
    n, classes = 4_000, 500
    dynamics, truth = made_of_many(n, classes, epochs=2)
    for name, value in (
        ("dynamics.CHANCES_AT_ONCE", 1 << 17),
        ("judging._KEPT", 0),
        ("transition.MOST_FITTED", 1_000),
        ("transition._ROUNDS", 1),
        ("views.MOST_VOTERS", 1_000),
        ("views._BLOCK", 1 << 18),
    ):
        monkeypatch.setattr(f"hydra_pipe.labels.{name}", value)
    tracemalloc.start()
    verdict = judge(dynamics)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * (n * classes + 5 * classes**2), peak
    assert roc_auc(verdict.score, dynamics.labels != truth) > 0.99


def test_too_many_classes_are_refused_with_the_bytes_that_they_need() -> None:
    n, classes = 4, 12_000
    own, kept = np.zeros((1, n)), np.zeros((1, n, 8))
    top = TopLogits(own, kept, kept.astype(np.int32), own, classes)
    with pytest.raises(DataError, match=r"12,000 classes.* 5\.36 GiB.* 4 GiB.*--method hydra"):
        judge(Dynamics(np.zeros(n, np.int64), top))

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headstart import heads
from headstart.heads import Head, fit, select


def examples(n: int = 300, d: int = 6, k: int = 3, seed: int = 0) -> tuple[Any, Any]:
    chance = np.random.default_rng(seed)
    truth = chance.integers(0, k, n)
    x = chance.normal(size=(n, d)) + 2 * np.eye(d)[truth]
    return (x * np.linspace(0.5, 20, d) + 7).astype(np.float32), truth


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("l2", [0.001, 0.1])
def test_on_hard_labels_the_head_is_scikit_learns_logistic_regression(k: int, l2: float) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x, truth = examples(k=k)
    head = fit(x, np.eye(k)[truth], np.ones(300), l2)
    # Of two classes scikit-learn penalises one difference u; here both weights, u / 2 and -u / 2, are
    # penalised, together half as much.
    known = LogisticRegression(C=(2 if k == 2 else 1) / (l2 * 300), tol=1e-10, max_iter=9999)
    z = StandardScaler().fit_transform(x)
    expected = known.fit(z, truth).predict_proba(z)
    assert head.probabilities(x) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("weights", [np.ones(300), np.random.default_rng(5).uniform(0.2, 3, 300)])
def test_a_soft_label_is_its_row_once_per_class_weighted(weights: Any) -> None:
    x, truth = examples(k=2)
    sure = np.random.default_rng(1).uniform(0.6, 1, 300)
    targets = np.where(np.eye(2)[truth] == 1, sure[:, None], 1 - sure[:, None])
    soft = fit(x, targets, weights, 0.01)
    twice = fit(
        np.concatenate([x, x]),
        np.eye(2)[np.concatenate([truth, 1 - truth])],
        np.concatenate([weights * sure, weights * (1 - sure)]),
        0.01,
    )
    assert soft.probabilities(x) == pytest.approx(twice.probabilities(x), abs=1e-3)


def test_the_penalty_means_the_same_for_any_number_of_rows() -> None:
    x, truth = examples()
    once = fit(x, np.eye(3)[truth], np.ones(300), 0.1)
    tenfold = fit(np.tile(x, (10, 1)), np.eye(3)[np.tile(truth, 10)], np.full(3000, 7.0), 0.1)
    assert once.probabilities(x) == pytest.approx(tenfold.probabilities(x), abs=1e-3)


def test_a_dimension_that_hardly_varies_is_harmless() -> None:
    x, truth = examples()
    constant = np.full((300, 3), [0.0, 0.1, -300.0], np.float32)
    faint = np.linspace(0, 1e-9, 300, dtype=np.float32)[:, None]
    with_dead = np.concatenate([x, constant, faint], axis=1)
    dead, alive = (fit(f, np.eye(3)[truth], np.ones(300), 0.01) for f in (with_dead, x))
    assert dead.scale[6:] == pytest.approx(np.median(alive.scale))
    assert np.abs(dead.weight[:, 6:]).max() < 1e-4
    assert dead.probabilities(with_dead) == pytest.approx(alive.probabilities(x), abs=1e-3)


def test_the_answer_does_not_depend_on_the_start() -> None:
    x, truth = examples()
    targets, weights = np.eye(3)[truth], np.ones(300)
    cold = fit(x, targets, weights, 0.01)
    warm = fit(x, targets, weights, 0.01, start=fit(x, targets, weights, 10))
    assert cold.probabilities(x) == pytest.approx(warm.probabilities(x), abs=1e-3)


def test_while_scipy_looks_for_the_head_its_blas_keeps_to_one_thread_and_numpys_to_all() -> None:
    from threadpoolctl import threadpool_info, threadpool_limits

    def threads() -> dict[str, int]:
        return {Path(pool["filepath"]).parent.name: pool["num_threads"] for pool in threadpool_info()}

    seen = []

    def bowl(at: Any) -> tuple[float, Any]:
        seen.append(threads())
        return float(at @ at), 2 * at

    with threadpool_limits(2):
        assert heads.minimised(bowl, np.array([3.0, -4.0])) == pytest.approx([0, 0], abs=1e-6)
        assert {pools["scipy.libs"] for pools in seen} == {1}
        assert {pools["numpy.libs"] for pools in seen} == {2}
        assert threads()["scipy.libs"] == 2


def test_more_dimensions_than_rows_are_no_problem() -> None:
    chance = np.random.default_rng(0)
    x, truth = chance.normal(size=(40, 200)).astype(np.float16), np.arange(40) % 2
    x[:, 0] += 6 * truth
    head = fit(x, np.eye(2)[truth], np.ones(40), 0.1)
    assert (head.probabilities(x).argmax(axis=1) == truth).all()


def test_a_memory_map_walked_in_blocks_gives_what_an_array_in_memory_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, truth = examples(n=1000)
    np.save(tmp_path / "x.npy", x.astype(np.float16))
    targets, weights = np.eye(3)[truth], np.ones(1000)
    whole = fit(x.astype(np.float16), targets, weights, 0.01)
    monkeypatch.setattr(heads, "BLOCK_BYTES", 24 * 70)  # 70 rows of 6 dimensions
    monkeypatch.setattr(heads, "KEEP_BYTES", 0)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    in_blocks = fit(mapped, targets, weights, 0.01)
    assert in_blocks.probabilities(mapped) == pytest.approx(whole.probabilities(x), abs=1e-2)


def test_validation_rows_choose_the_penalty_and_every_try_is_in_the_table() -> None:
    chance = np.random.default_rng(0)
    x, truth = chance.normal(size=(120, 40)), np.arange(120) % 2
    x[:, 0] += truth  # a little signal among noise: too weak a penalty learns the noise by heart
    train, val = ((x[s], np.eye(2)[truth[s]], np.ones(60)) for s in (slice(60), slice(60, None)))
    head, l2, table = select(train, val, [1e-4, 10.0, 1e-1, 1.0])
    assert [line["l2"] for line in table] == [10.0, 1.0, 0.1, 1e-4]
    assert l2 == min(table, key=lambda line: line["val_log_loss"])["l2"] != 1e-4
    assert head.probabilities(x) == pytest.approx(fit(*train, l2).probabilities(x), abs=2e-3)
    train_losses = [line["train_log_loss"] for line in table]
    assert train_losses == sorted(train_losses, reverse=True)


def test_rows_without_weight_choose_nothing() -> None:
    x, truth = examples(k=2)
    targets = np.eye(2)[truth]
    val = (x, np.concatenate([targets[:200], targets[200:, ::-1]]), np.repeat([1.0, 0.0], [200, 100]))
    train = (x, targets, np.ones(300))
    _, l2, table = select(train, val, [1, 0.01])
    _, l2_trimmed, trimmed = select(train, (x[:200], val[1][:200], val[2][:200]), [1, 0.01])
    assert l2 == l2_trimmed
    assert table == [pytest.approx(line) for line in trimmed]


def test_a_saved_head_predicts_the_same(tmp_path: Path) -> None:
    x, truth = examples()
    head = fit(x, np.eye(3)[truth], np.ones(300), 0.01)
    head.save(tmp_path / "head.safetensors")
    loaded = Head.load(tmp_path / "head.safetensors")
    assert (loaded.probabilities(x) == head.probabilities(x)).all()
    assert {array.dtype for array in vars(loaded).values()} == {np.dtype(np.float32)}


def test_probabilities_sum_to_one_even_for_wild_features() -> None:
    x, truth = examples()
    head = fit(x, np.eye(3)[truth], np.ones(300), 0.01)
    wild = head.probabilities(np.concatenate([x, x * 1e6]))
    assert wild.dtype == np.float64
    assert wild.sum(axis=1) == pytest.approx(1, abs=1e-12)


def test_input_that_makes_no_sense_is_refused() -> None:
    x, truth = examples(n=30)
    targets, weights = np.eye(3)[truth], np.ones(30)
    spoilt = x.copy()
    spoilt[3, 2] = np.inf
    for arguments in (
        (x[:0], targets[:0], weights[:0], 1.0),
        (x, targets[:9], weights, 1.0),
        (x, targets, weights[:9], 1.0),
        (x, targets, 0 * weights, 1.0),
        (x, targets, -weights, 1.0),
        (x, targets, weights, 0.0),
        (spoilt, targets, weights, 1.0),
    ):
        with pytest.raises(ValueError, match=r"fit|weights|penalties|finite"):
            fit(*arguments)
    with pytest.raises(ValueError, match="6 dimensions"):
        fit(x, targets, weights, 1.0).probabilities(x[:, :4])

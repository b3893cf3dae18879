"Intervals, paired differences, bands and the exact test: invariants, brute force, numbers by hand and by SciPy."
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from comam_nb.base.errors import DataError
from comam_nb.base.statistics import (Interval, _McNemar, bootstrap, comparison_table, mcnemar, mean_band,
                                      multiplicities, paired, t_interval)

quick = settings(max_examples=60, deadline=None)
outcome = st.tuples(st.booleans(), st.booleans(), st.integers(0, 5), st.integers(0, 2)) # right, right, task, seed
outcomes = st.lists(outcome, min_size=1, max_size=40)
numbers = lambda i: [i.mean, i.low, i.high]


def test_an_interval_prints_all_three_numbers_alike():
    i = Interval(0.05, -0.01, 0.11)
    assert (str(i), f"{i}", f"{i:+.2f}", f"{i:.1%}") == ("0.050 [-0.010, 0.110]", "0.050 [-0.010, 0.110]",
                                                         "+0.05 [-0.01, +0.11]", "5.0% [-1.0%, 11.0%]")
    assert not i.excludes_zero and Interval(1, .1, 2).excludes_zero and Interval(-1, -2, -.1).excludes_zero
    assert not Interval(0, 0, 1).excludes_zero and not t_interval([1.]).excludes_zero # nan excludes nothing
    assert i.half == pytest.approx(.06)


@quick
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.integers(0, 5))
def test_the_plain_bootstrap_is_the_naive_one(values, seed):
    draws = np.random.default_rng(seed).integers(0, len(values), (100, len(values)))
    low, high = np.quantile(np.array(values)[draws].mean(1), [.025, .975])
    assert np.allclose(numbers(bootstrap(values, 100, seed)), [np.mean(values), low, high])


def test_multiplicities_count_draws():
    counts = multiplicities(4, 50, 3)
    draws = np.random.default_rng(3).integers(0, 4, (50, 4))
    assert counts.tolist() == [[(row == k).sum() for k in range(4)] for row in draws]


def test_clusters_of_one_change_nothing_and_copies_add_nothing():
    values = np.random.default_rng(0).random(40)
    assert bootstrap(values, clusters=np.arange(40)) == bootstrap(values)
    thrice = bootstrap(np.repeat(values, 3), clusters=np.repeat(np.arange(40), 3))
    assert np.allclose(numbers(bootstrap(values)), numbers(thrice))


def test_unequal_clusters_keep_the_mean_of_the_data():
    interval = bootstrap([1, 1, 1, 0], clusters=["ana", "ana", "ana", "ben"]) # draws: only ana 1, only ben 0, both .75
    assert numbers(interval) == [.75, 0, 1]


@quick
@given(outcomes, st.integers(0, 3))
def test_tasks_and_seeds_are_the_pigeonhole_bootstrap(rows, seed):
    "By copying every outcome as often as its task was drawn times as often as its seed was."
    a, b, t, s = map(list, zip(*rows))
    ts, ss = sorted(set(t)), sorted(set(s))
    of_tasks = np.random.default_rng(seed).integers(0, len(ts), (200, len(ts)))
    of_seeds = np.random.default_rng(seed + 1).integers(0, len(ss), (200, len(ss)))
    means = []
    for i in range(200):
        copies = [int(x) - int(y) for x, y, k, l in rows
                  for _ in range((of_tasks[i] == ts.index(k)).sum() * (of_seeds[i] == ss.index(l)).sum())]
        if copies: means.append(np.mean(copies))
    got = paired(a, b, t, s, resamples=200, seed=seed)
    if len(ts) == len(ss) == 1: assert np.isnan([got.low, got.high]).all() # nothing was drawn
    else: assert np.allclose([got.low, got.high], np.quantile(means, [.025, .975]))
    assert got.mean == pytest.approx(np.mean([int(x) - int(y) for x, y, *_ in rows]), abs=1e-12)


@quick
@given(outcomes)
def test_paired_turns_its_sign_and_does_not_mind_the_order_of_rows(rows):
    a, b, t, s = map(list, zip(*rows))
    one, other = paired(a, b, t, s, 300), paired(b, a, t, s, 300)
    assert np.allclose(numbers(one), [-other.mean, -other.high, -other.low], equal_nan=True)
    back = paired(a[::-1], b[::-1], t[::-1], s[::-1], 300)
    assert np.allclose(numbers(one)[1:], numbers(back)[1:], equal_nan=True)
    assert numbers(paired(a, a, resamples=50)) == [0, 0, 0]
    users = paired(a, b, t)
    if len(set(t)) > 1: assert users.low <= users.mean + 1e-9 and users.mean <= users.high + 1e-9
    else: assert np.isnan(users.half)
    assert paired(a, b) == bootstrap(np.array(a, float) - np.array(b, float))


def test_paired_agrees_with_scipy():
    d = np.random.default_rng(0).normal(.2, 1, 300)
    got = paired(d, 0 * d, resamples=8000)
    ref = stats.bootstrap((d,), np.mean, method="percentile", n_resamples=8000, rng=1).confidence_interval
    assert np.allclose([got.low, got.high], ref, atol=.01)


def test_paired_sees_what_two_intervals_do_not():
    b = np.array([1] * 60 + [0] * 40); a = b.copy(); a[60:70] = 1
    assert bootstrap(a).low < bootstrap(b).high and paired(a, b).low > 0


@pytest.mark.parametrize("a, b, more, match", [
    ([1, 0], [1], {}, "same episodes"), ([], [], {}, "no values"), ([[1]], [[1]], {}, r"shape \(1, 1\)"),
    ([1, 2], [1, 2], {"clusters": ["x"]}, "one label for each value"), ([1, 2], [1, 2], {"seeds": [0]}, "one label")])
def test_what_does_not_fit_is_refused(a, b, more, match):
    with pytest.raises(DataError, match=match): paired(a, b, **more)

def test_what_is_no_number_is_refused():
    with pytest.raises(DataError, match="no table of numbers"): bootstrap(["a"])
    with pytest.raises(DataError, match="resamples is 0"): bootstrap([1, 2], resamples=0)


def test_comparison_table_by_hand():
    table = comparison_table({"a": np.ones(50), "b": np.zeros(50)}, "b").splitlines()
    assert table[2] == "| a | 1.000 | 1.000 to 1.000 | +1.000 [+1.000, +1.000] * |"
    assert table[3] == "| b | 0.000 | 0.000 to 0.000 | – |"
    with pytest.raises(DataError, match="no row 'c'"): comparison_table({"a": [1]}, "c")


def test_mean_band_is_scipys_interval():
    values = np.random.default_rng(0).random((5, 7))
    mean, half = mean_band(values)
    low, high = stats.t.interval(.95, 4, loc=values.mean(0), scale=values.std(0, ddof=1) / 5 ** .5)
    assert np.allclose(mean - half, low) and np.allclose(mean + half, high)
    one = t_interval(values[:, 2])
    assert np.allclose(numbers(one), [mean[2], low[2], high[2]]) and one.half == pytest.approx(half[2])
    mean, half = mean_band(values[:1])
    assert np.allclose(mean, values[0]) and np.isnan(half).all()


def test_a_band_passes_over_seeds_without_a_value():
    mean, half = mean_band([[.4, 1., math.nan], [.5, math.nan, math.nan], [.6, math.nan, math.nan]])
    assert mean[:2].tolist() == pytest.approx([.5, 1]) and half[0] == pytest.approx(4.302653 * .1 / 3 ** .5)
    assert np.isnan([mean[2], half[1], half[2]]).all()


@quick
@given(st.integers(0, 80), st.integers(0, 80))
def test_mcnemar_is_the_sum_of_binomial_tails(gained, lost):
    m = mcnemar([1] * gained + [0] * lost + [1], [0] * gained + [1] * lost + [1])
    n = gained + lost
    tail = 2 * sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n
    assert (m.gained, m.lost) == (gained, lost) and m.p == pytest.approx(min(1, tail), rel=1e-9)


def test_a_task_votes_once_however_many_seeds():
    once, often = mcnemar([1, 1, 0], [0, 0, 1]), mcnemar([1, 1, 0] * 5, [0, 0, 1] * 5, ["x", "y", "z"] * 5)
    assert once == often == _McNemar(2, 1, 1.0)
    for args in (([1], [1, 0]), ([1, 0], [0, 1], ["x"])):
        with pytest.raises(DataError, match="a label for each"): mcnemar(*args)


def test_scipy_is_not_loaded_with_the_module():
    import subprocess, sys
    code = "import sys, comam_nb.base.statistics; print('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"

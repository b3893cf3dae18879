"Intervals, tables and plots of the evaluation notebook: invariants and numbers from other libraries."
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import t as student

from comam_nb.base.errors import DataError
from comam_nb.studies.plots import EVENTS, plot_bands, plot_heat, plot_timeline
from comam_nb.base.statistics import bootstrap, comparison_table, mean_band, paired, t_quantile


def test_clusters_of_one_change_nothing_and_copies_add_nothing():
    values = np.random.default_rng(0).random(40)
    assert bootstrap(values, clusters=np.arange(40)) == bootstrap(values)
    once = bootstrap(values)
    thrice = bootstrap(np.repeat(values, 3), clusters=np.repeat(np.arange(40), 3))
    assert np.allclose([once.mean, once.low, once.high], [thrice.mean, thrice.low, thrice.high])


def test_unequal_clusters_keep_the_mean_of_the_data():
    interval = bootstrap([1, 1, 1, 0], clusters=["ana", "ana", "ana", "ben"]) # draws: only ana 1, only ben 0, both .75
    assert (interval.mean, interval.low, interval.high) == (.75, 0, 1)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 3)), min_size=1, max_size=40))
def test_paired_turns_its_sign_with_the_order(rows):
    a, b, users = zip(*rows)
    x, y = paired(a, b, users), paired(b, a, users)
    assert np.allclose([x.mean, x.low, x.high], [-y.mean, -y.high, -y.low])
    assert x.low <= x.mean + 1e-9 and x.mean <= x.high + 1e-9


def test_paired_sees_what_two_intervals_do_not():
    b = np.array([1] * 60 + [0] * 40); a = b.copy(); a[60:70] = 1
    assert bootstrap(a).low < bootstrap(b).high and paired(a, b).low > 0


def test_lengths_must_fit():
    with pytest.raises(DataError, match="same episodes"): paired([1, 0], [1])
    with pytest.raises(DataError, match="one label for each value"): bootstrap([1, 0], clusters=["ana"])
    with pytest.raises(DataError, match="no row 'c'"): comparison_table({"a": [1]}, "c")


def test_comparison_table_by_hand():
    table = comparison_table({"a": np.ones(50), "b": np.zeros(50)}, "b").splitlines()
    assert table[2] == "| a | 1.000 | 1.000 to 1.000 | +1.000 [+1.000, +1.000] * |"
    assert table[3] == "| b | 0.000 | 0.000 to 0.000 | – |"


@pytest.mark.parametrize("freedom", [1, 2, 4, 9, 10, 11, 15, 30, 200])
def test_t_is_scipys(freedom): assert t_quantile(freedom) == pytest.approx(student.ppf(.975, freedom), abs=1e-3)


def test_mean_band_is_scipys_interval():
    values = np.random.default_rng(0).random((5, 7))
    mean, half = mean_band(values)
    low, high = student.interval(.95, 4, loc=values.mean(0), scale=values.std(0, ddof=1) / 5 ** .5)
    assert np.allclose(mean - half, low, atol=1e-3) and np.allclose(mean + half, high, atol=1e-3)
    mean, half = mean_band(values[:1])
    assert np.allclose(mean, values[0]) and np.isnan(half).all()


def test_plots_draw_what_they_are_given():
    import matplotlib.pyplot as plt
    ax = plot_bands(None, {"x": np.ones((3, 5)), "y": ([10, 20], np.zeros((2, 2)))}, smooth=2, ylabel="right")
    assert len(ax.lines) == 2 and len(ax.collections) == 2 and ax.get_ylabel() == "right"
    assert ax.lines[0].get_linestyle() != ax.lines[1].get_linestyle() and list(ax.lines[1].get_xdata()) == [10, 20]
    assert np.allclose(ax.lines[0].get_ydata(), 1)
    ax = plot_heat([[0, 2], [1, np.nan]], ["a", "b"], ["c", "d"])
    assert sorted(t.get_text() for t in ax.texts) == ["0", "1", "2"]
    plot_heat(np.zeros((1, 1)), ["a"], ["b"])
    ax = plot_timeline([(1, "stored", "x" * 60), (2, "superseded", "x" * 60), (3, "used", "y")])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["x" * 47 + "…", "y"]
    plt.close("all")


def test_plots_refuse_what_they_cannot_draw():
    with pytest.raises(DataError, match=r"shape \(1, 2\)"): plot_heat([[1, 2]], ["a"], ["b"])
    with pytest.raises(DataError, match="unknown event 'lost'"): plot_timeline([(1, "lost", "x")])
    assert set(EVENTS) == {"stored", "superseded", "forgotten", "used"}

"Which episodes are rolled out: the weights, whatever the power, and what a sampler refuses."
import math
from collections import Counter

import numpy as np
import pytest

from comam_nb.base.errors import CreditError
from comam_nb.rl.sampler import PrioritySampler


@pytest.mark.parametrize("power", [0, .5, 2])
def test_a_pair_is_drawn_as_one_by_one(power):
    "P(a, then b) = w_a / W · w_b / (W - w_a), the definition of drawing without replacement by weight."
    s = PrioritySampler(4, power=power)
    s.update(range(4), [1, .5, .25, 0])
    w = np.array([(s.priority(e) + .02)**power for e in range(4)])
    drawn = Counter(tuple(s.choose(2)) for _ in range(8000))
    for a in range(4):
        for b in {*range(4)} - {a}:
            assert drawn[a, b] / 8000 == pytest.approx(w[a] / w.sum() * w[b] / (w.sum() - w[a]), abs=.025)


@pytest.mark.parametrize("power, epsilon", [(1, 0), (3, .02), (50, .02), (500, 1e-9)])
def test_where_nothing_was_learned_all_are_alike_whatever_the_power(power, epsilon):
    s = PrioritySampler(50, power=power, epsilon=epsilon)
    s.update(range(50), [0.] * 50)
    drawn = Counter(e for _ in range(400) for e in s.choose(5))
    assert len(drawn) == 50 and max(drawn.values()) < 90 # 40 of each are expected


def test_a_high_power_takes_the_best():
    s = PrioritySampler(5, power=1000)
    s.update(range(5), [.1, .2, .3, .4, .5])
    assert s.choose(3) == [4, 3, 2]


@pytest.mark.parametrize("make", [
    lambda: PrioritySampler(0), lambda: PrioritySampler(4, decay=2), lambda: PrioritySampler(4, power=-1),
    lambda: PrioritySampler(4, power=math.nan), lambda: PrioritySampler(4, epsilon=-1),
    lambda: PrioritySampler(4).update([0], [math.nan]), lambda: PrioritySampler(4).update([0], [-1.]),
    lambda: PrioritySampler(4).update([0, 1], [1.]), lambda: PrioritySampler(4).update([], [])])
def test_what_makes_no_weights_is_refused(make):
    with pytest.raises(CreditError, match="take|give"): make()

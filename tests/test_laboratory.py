"The credit laboratory against scipy and scikit-learn, hand-computed games, and invariants."
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats

import comam_nb.studies.laboratory as lab
from comam_nb.base.errors import CreditError, DataError
from comam_nb.base.statistics import bootstrap
from comam_nb.studies.laboratory import (
    LAB_SCHEMES, LAB_WORLDS, _DifferenceRewards, _cut, _kendall, _pearson, _play, _spearman, _tie_noise,
    _variance_explained, _write_groups, _by_measure, contributions, counterfactual, learning_curves,
    measure_schemes, read_curves, read_groups, scheme_weights, shapley)
from comam_nb.mdp import AGENTS, Scripted, rollout
from comam_nb.microworld import MicroWorld, make_episodes, understudy
from comam_nb.worlds.warm_start import micro_agents, micro_rewards, _world_agents

MEASURES = LAB_SCHEMES[:6]
close = torch.testing.assert_close
level = st.sampled_from([0., .25, .5, 1 / 3, 1.]) # few levels, so that ties are common
TINY = dict(steps=1, episodes_per_step=1, group=2, eval_episodes=2)


@st.composite
def groups(draw, glob=level):
    G = draw(st.integers(2, 9))
    row = lambda of: [draw(of) for _ in range(G)]
    table = lambda rows: torch.tensor(rows, dtype=torch.float64)
    return table([row(level) for _ in range(3)]), table(row(glob))


@settings(max_examples=80, deadline=None)
@given(groups())
def test_correlations_equal_scipy_with_ties(group):
    local, glob = group
    varies = lambda x: x.max() > x.min()
    for ours, theirs in ((_pearson, stats.pearsonr), (_spearman, stats.spearmanr), (_kendall, stats.kendalltau)):
        expected = [theirs(row.numpy(), glob.numpy())[0] if varies(row) and varies(glob) else 0.0 for row in local]
        close(ours(local, glob), torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


@settings(max_examples=40, deadline=None)
@given(groups())
def test_variance_explained_is_the_r2_of_a_regression(group):
    linear = pytest.importorskip("sklearn.linear_model")
    local, glob = group
    if glob.max() == glob.min(): assert _variance_explained(local, glob).tolist() == [0, 0, 0]; return
    r2 = lambda x, y: linear.LinearRegression().fit(x, y).score(x, y)
    expected = [r2(row[:, None].numpy(), glob.numpy()) for row in local]
    close(_variance_explained(local, glob), torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


@settings(max_examples=30, deadline=None)
@given(groups(glob=st.sampled_from([0., 1.])), st.randoms(use_true_random=False))
def test_weights_are_shares_and_do_not_depend_on_the_order_of_rollouts_or_agents(group, random):
    local, glob = group
    order, agents = list(range(len(glob))), [0, 1, 2]
    random.shuffle(order); random.shuffle(agents)
    for m in MEASURES:
        scheme = _by_measure(m)
        w = scheme(local, glob)
        assert w.isfinite().all() and (w >= 0).all() and w.sum().item() == pytest.approx(1)
        close(scheme(local[:, order], glob[order]), w)
        close(scheme(local[agents], glob), w[agents])
        if glob.max() == glob.min(): close(w, torch.full((3,), 1 / 3, dtype=torch.float64)) # nobody's merit


def test_batches_are_the_same_as_one_group_after_the_other():
    rng = torch.Generator().manual_seed(0)
    local, glob = torch.rand(4, 3, 8, generator=rng), (torch.rand(4, 8, generator=rng) < 0.5).float()
    for m in map(_by_measure, MEASURES): close(m(local, glob), torch.stack([m(l, g) for l, g in zip(local, glob)]))


def test_where_nothing_varies_there_is_no_evidence_and_no_warning():
    "A correlation with a constant is 0, also if rounding makes the constant flicker; the last agent's is as ever."
    import warnings
    local = torch.tensor([[.1, .1, .1], [.1 + 1e-12, .1, .1], [0., .5, 1.]], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _pearson(local, [0., .5, 1.]).tolist() == [0, 0, pytest.approx(1)]
        assert _spearman(local, [0., .5, 1.])[0] == _kendall(local, [0., .5, 1.])[0] == 0
        for m in (_pearson, _spearman, _kendall): assert m(local, [1., 1., 1.]).tolist() == [0, 0, 0]


def test_a_measure_is_a_name_or_a_function():
    local, glob = torch.rand(3, 4), torch.rand(4)
    close(_by_measure(_kendall)(local, glob), _by_measure("kendall")(local, glob))
    with pytest.raises(CreditError, match="unknown measure 'fair'.*kendall"): _by_measure("fair")


def test_bad_rewards_are_refused():
    for m in (_pearson, _spearman, _kendall, _variance_explained):
        with pytest.raises(CreditError, match="NaN"): m([[math.nan, 1.]], [0., 1.])
        with pytest.raises(CreditError, match="group size is 1"): m([[1.]], [1.])


def test_shapley_of_the_glove_game_and_of_an_additive_one():
    glove = torch.tensor([0., 0, 0, 1, 0, 1, 0, 1]) # left glove: agent 0; right gloves: agents 1 and 2
    close(shapley(glove), torch.tensor([4 / 6, 1 / 6, 1 / 6], dtype=torch.float64))
    additive = torch.tensor([float(sum(x for n, x in enumerate((3, -2, 5)) if S >> n & 1)) for S in range(8)])
    close(shapley(additive), torch.tensor([3., -2, 5], dtype=torch.float64))
    close(shapley(torch.tensor([0., 0, 0, 1])), torch.tensor([.5, .5], dtype=torch.float64)) # two agents: only together


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=8, max_size=8))
def test_shapley_values_share_out_the_gain_and_are_the_mean_over_orders(values):
    import itertools
    phi = shapley(torch.tensor(values, dtype=torch.float64))
    assert phi.sum().item() == pytest.approx(values[7] - values[0], abs=1e-9)
    naive = [0.0] * 3
    for order in itertools.permutations(range(3)):
        S = 0
        for n in order: naive[n] += (values[S | 1 << n] - values[S]) / 6; S |= 1 << n
    close(phi, torch.tensor(naive, dtype=torch.float64), atol=1e-9, rtol=0)


def test_intervals_of_shapley_values_are_points_without_variance():
    answers = torch.tensor([float(S & 1) for S in range(8)])[None, :, None].repeat(5, 1, 2)
    found = [bootstrap(x) for x in shapley(answers.mean(-1)).T]
    assert [(i.mean, i.low, i.high) for i in found] == [(1, 1, 1), (0, 0, 0), (0, 0, 0)]


@pytest.fixture(scope="module")
def played():
    "Four episodes of the micro-world played by scripted casts: one says nothing, the other is perfect."
    world = MicroWorld(budget=10, profile_budget=10)
    silent = {n: type(a)(Scripted([""])) for n, a in _world_agents(world).items()}
    episodes = make_episodes(world, 4)
    found = contributions(silent, silent, episodes, micro_rewards(world), understudy(world, AGENTS), G=2)
    return world, silent, episodes, found


def test_silent_agents_contribute_nothing_and_one_perfect_agent_cannot_save_them(played):
    world, silent, episodes, found = played
    assert found["answers"].sum() == 0 and found["perfect"].sum() == 0
    assert shapley(found["answers"].mean(-1)).abs().max() == 0


def test_perfect_agents_are_pivotal_where_the_others_are_perfect_too(played):
    world, silent, episodes, _ = played
    perfect = understudy(world, AGENTS)
    casts = {"trained": perfect, "warm": silent, "perfect": perfect}
    runs = _play(casts, lab._PLANS, episodes, 1)
    values = torch.tensor([[g[0] for g in micro_rewards(world)(runs[p])[1]] for p in lab._PLANS]).T # [E, 8]
    for v, e in zip(values, episodes):
        needed = 7 if e.query.kind == "profile" else 5 # a question for a fact needs no profile
        assert v.tolist() == [float(S & needed == needed) for S in range(8)]


def test_the_same_cast_in_the_same_state_acts_alike():
    episodes = make_episodes(MicroWorld(hurt=(0.0, 0.0, 1.0)), 3)
    world = MicroWorld(hurt=(0.0, 0.0, 1.0))
    torch.manual_seed(0)
    a, b = micro_agents(world), micro_agents(world, seed=1)
    perfect, stand_ins = understudy(world, AGENTS), understudy(world)
    found = contributions(a, b, episodes, micro_rewards(world), perfect, G=4, intervene=stand_ins)
    assert counterfactual(found)[:, :2].abs().max() == 0 # of the two with stand-ins nothing depends on who they are


def test_contributions_leave_the_random_state_alone():
    world = MicroWorld()
    agents = micro_agents(world)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    kwargs = dict(G=2, intervene=None, seed=5)
    args = (agents, agents, make_episodes(world, 2), micro_rewards(world), understudy(world, AGENTS))
    one, two = (contributions(*args, **kwargs) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before) and torch.equal(one["answers"], two["answers"])


def test_known_rollouts_are_not_played_again():
    world = MicroWorld()
    episodes, agents = make_episodes(world, 2), micro_agents(world)
    groups = rollout(agents, episodes, 3)
    silent = {n: type(a)(Scripted(["never"])) for n, a in _world_agents(world).items()}
    runs = _play({"team": silent}, [("team",) * 3], episodes, 3, known={"team": groups})
    assert [t.final for g in runs[("team",) * 3] for t in g] == [t.final for g in groups for t in g]


def test_difference_rewards_by_hand():
    "A silent team against perfect defaults: nobody alone can mend it, all are 0; the other way round all are missed."
    world = MicroWorld(budget=10, profile_budget=10, profile_share=1.0)
    silent = {n: type(a)(Scripted([""])) for n, a in _world_agents(world).items()}
    episodes, perfect = make_episodes(world, 2), understudy(world, AGENTS)
    groups = rollout(silent, episodes, 2)
    scheme = _DifferenceRewards(micro_rewards(world), silent, perfect)
    local, answers = scheme.watch(groups)
    close(scheme(torch.tensor(local[0]), torch.tensor(answers[0])), torch.full((3,), 1 / 3, dtype=torch.float64))
    runs = _play({"perfect": perfect}, [("perfect",) * 3], episodes, 2)[("perfect",) * 3]
    scheme = _DifferenceRewards(micro_rewards(world), perfect, silent, seed=1)
    local, answers = scheme.watch(runs)
    assert [v.tolist() for _, _, v in scheme.waiting] == [[1, 1, 1], [1, 1, 1]]
    with pytest.raises(CreditError, match="no replay"): scheme(torch.zeros(3, 2), torch.zeros(2))


def test_a_turned_reward_only_turns_its_agent():
    groups = rollout(micro_agents(MicroWorld()), make_episodes(MicroWorld(), 2), 3)
    plain, turned = micro_rewards(MicroWorld())(groups), LAB_WORLDS["harmful"].rewards()(groups)
    close(turned[0][:, 0], 0.25 * (1 - torch.tensor(plain[0]).double()[:, 0]))
    close(turned[0][:, 1:], torch.tensor(plain[0]).double()[:, 1:])
    assert turned[1] == plain[1]


def made(E=3, G=16, seed=0):
    rng = torch.Generator().manual_seed(seed)
    coin = lambda *shape: (torch.rand(shape, generator=rng) < 0.5).double()
    return {"local": torch.rand(E, 3, G, generator=rng).double(), "answers": coin(E, 8, G), "perfect": coin(E, 3, G)}


def test_groups_come_back_from_their_file(tmp_path):
    found = made()
    _write_groups(tmp_path / "g.jsonl", found, {"world": "x"})
    back = read_groups(tmp_path / "g.jsonl")
    assert all(torch.equal(back[k], found[k]) for k in ("answers", "perfect")) and back["about"] == {"world": "x"}
    close(back["local"], found["local"], atol=1e-4, rtol=0)
    lines = (tmp_path / "g.jsonl").read_text().splitlines()
    (tmp_path / "g.jsonl").write_text("\n".join([*lines[:2], lines[2][:50]]))
    with pytest.raises(DataError, match="line 3"): read_groups(tmp_path / "g.jsonl")


def test_no_rollout_is_on_both_sides():
    found = made()
    changed = {k: v.clone() for k, v in found.items()}
    changed["answers"][..., :8] = 1 # the first half
    for G in (2, 4, 8):
        a, b, first = _cut(found, G), _cut(changed, G), 8 // G
        close(a["truth"][:, :first], b["truth"][:, :first]) # the first half's blocks: against the second half
        close(a["r_ans"][:, first:], b["r_ans"][:, first:])
    with pytest.raises(CreditError, match="divisor"): _cut(found, 3)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000))
def test_all_schemes_give_shares_and_finite_measures(seed):
    found = made(E=6, seed=seed)
    found["answers"][0] = 1.0 # an episode that is always right
    for w in scheme_weights(found, 4).values():
        assert w.isfinite().all() and (w >= 0).all()
        close(w.sum(-1), torch.ones_like(w[..., 0]))
    for r in measure_schemes(found, (4, 8), resamples=20):
        assert r["alike"] == (_cut(found, r["G"])["r_ans"].std(-1) == 0).double().mean()
        assert -1 <= r["low"] <= r["high"] <= 1 and 0 <= r["hit"] <= 1 and r["sd"] >= 0
        if r["scheme"] == "equal": assert r["agreement"] == 0 and r["sd"] == 0


def test_no_contributions_nothing_to_measure():
    found = made()
    found["answers"][:] = 1.0
    with pytest.raises(CreditError, match="nothing to agree with"): measure_schemes(found, (4,))


def test_only_ties_can_be_broken():
    found = made()
    found["answers"] = torch.rand(3, 8, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64) # no ties
    assert max(_tie_noise(_cut(found, 8)).values()) < 1e-5
    assert _tie_noise(_cut(made(), 8))["kendall"] > 0.005


def test_unknown_names_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(CreditError, match="unknown scheme"):
        learning_curves(tmp_path / "c.jsonl", schemes=["fair"], processes=0, **TINY)
    assert list(tmp_path.iterdir()) == []


def test_learning_curves_resume_where_they_stopped(tmp_path, monkeypatch):
    out, played = tmp_path / "c.jsonl", []
    one = learning_curves(out, ["kendall"], ["decisive"], [0], processes=0, **TINY)
    assert len(one[0]["answer_accuracy"]) == 1 and sum(one[0]["weights"][0]) == pytest.approx(1, abs=1e-3)
    assert 0 <= one[0]["final"] <= 1
    out.write_text(out.read_text() + '{"scheme": "equ') # killed in the middle of a line
    def run(scheme, world, seed, **kw):
        played.append((scheme, world, seed))
        return {**one[0], "scheme": scheme, "world": world, "seed": seed}
    monkeypatch.setattr(lab, "_run_curve", run)
    all_ = learning_curves(out, ["kendall", "equal"], ["decisive"], [0, 1], processes=0, **TINY)
    assert played == [("equal", "decisive", 0), ("kendall", "decisive", 1), ("equal", "decisive", 1)] # not the finished
    assert read_curves(out)[1] == all_ and all_[0] == one[0]
    with pytest.raises(DataError, match="other settings"):
        learning_curves(out, ["equal"], ["equal"], [0], processes=0, **{**TINY, "steps": 2})
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match="no settings"): read_curves(tmp_path / "x.jsonl")


@pytest.mark.slow
def test_worker_processes_write_the_same_file(tmp_path):
    learning_curves(tmp_path / "a.jsonl", ["difference"], ["harmful"], [0], processes=0, **TINY)
    learning_curves(tmp_path / "b.jsonl", ["difference"], ["harmful"], [0], processes=1, **TINY)
    strip = lambda f: [{k: v for k, v in r.items() if k != "seconds"} for r in read_curves(tmp_path / f)[1]]
    assert strip("a.jsonl") == strip("b.jsonl")

"Properties and references for comam_nb.credit: brute force, scikit-learn, TRL, hypothesis."
import itertools
import math
import pytest
import torch
from hypothesis import given, settings, strategies as st
from comam_nb.base.errors import CreditError
from comam_nb.credit import assign, credit_weights, fixed, integrate, ndcg_consistency, rescaled_consistency
from comam_nb.grpo import group_advantages, grpo_loss

LOCAL = [[1, .9, 7/15, 0], [.9, .6, .3, 0], [.5, 1, .5, 0]]     # the example episode's four rollouts
GLOB = [1., 1., 0., 0.]
close = torch.testing.assert_close
level = st.sampled_from([0., .25, .5, 1/3, 1.])     # few levels, so that ties are common


@st.composite
def groups(draw, glob=level, max_G=8):
    A, G = draw(st.integers(1, 4)), draw(st.integers(2, max_G))
    return (torch.tensor([[draw(level) for _ in range(G)] for _ in range(A)], dtype=torch.float64),
            torch.tensor([draw(glob) for _ in range(G)], dtype=torch.float64))


@settings(max_examples=60, deadline=None)
@given(groups(max_G=6))
def test_ties_equal_brute_force(group):
    "CoMAM Eq. 13: the mean over every order that the ties leave open."
    local, glob = group
    G = glob.numel()
    disc = [1/math.log2(p + 2) for p in range(G)]
    best = sum(d*g for d, g in zip(disc, sorted(glob.tolist(), reverse=True)))
    for v, row in zip(ndcg_consistency(local, glob), local.tolist()):
        dcg = [sum(d*glob[i].item() for d, i in zip(disc, o)) for o in itertools.permutations(range(G))
               if all(row[i] >= row[j] for i, j in zip(o, o[1:]))]
        assert v.item() == pytest.approx(sum(dcg)/len(dcg)/best if best else 1, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(groups())
def test_equals_sklearn(group):
    "CoMAM Eq. 13."
    ndcg_score = pytest.importorskip("sklearn.metrics").ndcg_score
    local, glob = group
    if glob.max() > glob.min():
        close(ndcg_consistency(local, glob), torch.tensor([ndcg_score([glob.numpy()], [r.numpy()]) for r in local],
                                                          dtype=torch.float64))


@settings(max_examples=100, deadline=None)
@given(groups(glob=st.one_of(level, st.just(-1.))), st.randoms(use_true_random=False), st.booleans(),
       st.sampled_from([.1, 1., 3.]))
def test_invariances(group, random, rescale, tau):
    local, glob = group
    w = credit_weights(local, glob, temperature=tau, rescale=rescale)
    assert w.isfinite().all() and w.sum().item() == pytest.approx(1)
    order = list(range(glob.numel())); random.shuffle(order)
    close(credit_weights(local[:, order], glob[order], temperature=tau, rescale=rescale), w)     # order of rollouts
    # monotone maps of local
    for f in (torch.exp, lambda x: 3*x - 7, lambda x: x**3):
        close(credit_weights(f(local), glob, temperature=tau, rescale=rescale), w)
    close(credit_weights(local, glob*5, temperature=tau, rescale=rescale), w)                    # scale of global
    agents = list(range(len(local))); random.shuffle(agents)
    close(credit_weights(local[agents], glob, temperature=tau, rescale=rescale), w[agents])


@settings(max_examples=60, deadline=None)
@given(groups(), level)
def test_all_equal_groups_have_no_nan(group, value):
    local, _ = group
    glob = torch.full(local.shape[1:], value)
    for rescale in (False, True):
        close(credit_weights(local, glob, rescale=rescale), torch.full((len(local),), 1/len(local),
            dtype=torch.float64))
    for scheme in ("adaptive", "equal", "local", "global"):
        c = assign(local*0, glob, scheme)
        # the mean of equal numbers may round
        assert c.rewards.isfinite().all() and group_advantages(c.rewards).abs().max() < 1e-9


def test_rounding_is_not_a_ranking():
    v = rescaled_consistency(LOCAL, [1, 1 - 2**-53, 1, 1])
    assert v.tolist() == [1, 1, 1]


@settings(max_examples=40, deadline=None)
@given(groups())
def test_rescaled_is_zero_on_average_over_all_rankings(group):
    glob = group[1][:5]
    if glob.max() == glob.min(): return
    ranks = torch.tensor(list(itertools.permutations(range(glob.numel()))), dtype=torch.float64)   # [G!, G]
    v = rescaled_consistency(ranks, glob)
    assert v.mean().item() == pytest.approx(0, abs=1e-9) and v.max().item() == pytest.approx(1)


def test_fixture_by_hand():
    "CoMAM Eq. 13-15."
    close(ndcg_consistency(LOCAL, GLOB), torch.tensor([1, 1, 1.56546/1.63093], dtype=torch.float64), atol=1e-5, rtol=0)
    c = assign([LOCAL], [GLOB])
    close(c.weights[0], torch.tensor([.33776, .33776, .32447], dtype=torch.float64), atol=1e-5, rtol=0)
    close(c.rewards[0, 2], torch.tensor([.82447, 1.32447, .5, 0], dtype=torch.float64), atol=1e-5, rtol=0)


def test_advantages_equal_trl():
    "The advantage of CoMAM Eq. 16."
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    rewards = assign(torch.rand(5, 3, 8), (torch.rand(5, 8) < .5).float()).rewards.float().reshape(-1)
    grouped = rewards.view(-1, 8)      # as in GRPOTrainer._generate_and_score_completions, scale_rewards="group"
    trl = (rewards - torch.nanmean(grouped, dim=1).repeat_interleave(8)) / (nanstd(grouped, dim=1).repeat_interleave(8)
        + 1e-4)
    ours = group_advantages(grouped)
    assert ours.dtype == torch.float32
    close(ours.reshape(-1), trl, atol=1e-6, rtol=1e-6)
    close(group_advantages(grouped, eps=0, ddof=0) * (7/8)**.5, group_advantages(grouped, eps=0))


def test_batch_is_one_at_a_time():
    local, glob = torch.rand(6, 3, 4), (torch.rand(6, 4) < .5).float()
    for scheme in ("adaptive", "equal", "local", "global", fixed([.1, .2, .7]), lambda l, g: l.mean(-1)):
        for rule in ("eq15", "alg1", "local", "global"):
            got = assign(local, glob, scheme, rule=rule)
            want = [assign(l, g, scheme, rule=rule) for l, g in zip(local, glob)]
            close(got.rewards, torch.stack([c.rewards for c in want]))
            close(got.weights, torch.stack([c.weights for c in want]))


def test_ablations():
    glob = torch.tensor(GLOB, dtype=torch.float64)
    local = torch.tensor(LOCAL, dtype=torch.float64)
    close(assign(local, glob, "local", rule="alg1").rewards, local)
    close(assign(local, glob, "global").rewards, glob.expand(3, 4))
    close(assign(local, glob, "equal").rewards, local + glob/3)
    close(assign(local, glob, "equal", rule="alg1").rewards, glob + local/3)


@pytest.mark.parametrize("call, says", [
    (lambda: credit_weights(LOCAL, GLOB, "shapely"), "adaptive, equal, local, global"),
    (lambda: credit_weights(LOCAL, GLOB, lambda l, g: [float("nan")]*3), "finite"),
    (lambda: credit_weights(LOCAL, GLOB, fixed([1, 1])), "expected 3"),
    (lambda: credit_weights(LOCAL, GLOB, temperature=0), "above 0"),
    (lambda: assign([[[1.], [0.]]], [[1.]]), "group size is 1"),
    (lambda: assign([LOCAL], GLOB), "expected [..., A, G]"),
    (lambda: assign([[[1, 0], [1]]], [[1, 0]]), "not a table of numbers"),
    (lambda: integrate(LOCAL, GLOB, [1, 1, 1], "eq9"), "eq15, alg1"),
    (lambda: integrate(LOCAL, GLOB, [1, 1]), "one weight per agent"),
    (lambda: ndcg_consistency(LOCAL, [1, 0, float("inf"), 0]), "NaN or infinite"),
    (lambda: group_advantages("ab"), "no table of numbers"),
    (lambda: grpo_loss(*torch.zeros(2, 2, 3), torch.ones(2), torch.ones(2, 3), level="sentence"), "token or sequence"),
    (lambda: grpo_loss(*torch.zeros(2, 2, 3), torch.ones(1), torch.ones(2, 3)), "one for each"),
    (lambda: group_advantages([1.]), "at least 2")])
def test_errors_say_what_to_do(call, says):
    with pytest.raises(CreditError) as e: call()
    assert says in str(e.value) and "\n" not in str(e.value)

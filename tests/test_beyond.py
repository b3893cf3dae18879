"Memory across backbones: crossings, their table, and the runs on tiny budgets."
import pytest

from comam_nb.base.errors import BackboneError, DataError
from comam_nb.microworld import MicroWorld, make_episodes
from comam_nb.worlds.warm_start import micro_agents, micro_rewards
from comam_nb.studies.ablation import Budget
from comam_nb.studies.crossing import (_BACKBONES, _cross, _tiny_neox, _transfer_table, _warm_folder, beyond,
                                       _memory_transfer)

def test_a_crossing_takes_its_reader_from_the_other_team():
    A, B = ({n: f"{t}-{n}" for n in ("extraction", "profile", "retrieval")} for t in "AB")
    assert _cross(A, B) == {"extraction": "A-extraction", "profile": "A-profile", "retrieval": "B-retrieval"}
    assert _cross(A, A) == A

def test_both_backbones_read_and_write():
    "Every crossing answers more than a guess among ten values."
    world = MicroWorld()
    teams = {n: micro_agents(world, folder=_warm_folder(n)) for n in _BACKBONES}
    assert len({t["profile"].policy.model.config.model_type for t in teams.values()}) == 2
    right = _memory_transfer(teams, make_episodes(world, 60, held_out=True), micro_rewards(world))
    assert set(right) == {(a, b) for a in _BACKBONES for b in _BACKBONES}
    assert all(v.mean() > 0.2 for v in right.values())

def test_the_transfer_table_by_hand():
    "Two seeds, two teams. B answers .5 and .75 from its own memory, 0 and .25 from A's: a lead of .5 in both."
    def row(seed, **bits):
        return dict(kind="transfer", seed=seed, right=[dict(builder=a, reader=b, bits=x) for (a, b), x in bits.items()])
    names, mean, half, lead, lead_half = _transfer_table([row(0, AA="1111", AB="0000", BA="1100", BB="1100"),
                                                          row(1, AA="1111", AB="1000", BA="1000", BB="1110")])
    assert names == ["A", "B"] and mean.tolist() == [[1, .125], [.375, .625]]
    assert (lead[0, 1], lead_half[0, 1]) == (.5, 0) and lead[1, 0] == pytest.approx(.625)
    assert half[0, 1] == pytest.approx(12.7062 * 0.125, rel=1e-3) # t with one degree of freedom, standard error 0.125

@pytest.mark.slow
def test_runs_are_resumed(tmp_path):
    said, small = [], Budget(steps=1, episodes_per_step=1, group_size=4, eval_episodes=4)
    rows = beyond(tmp_path, 1, small, 1, ("priority", "mixed"), said.append)
    assert [r["kind"] for r in rows] == ["priority", "mixed"] and len(said) == 2
    again = beyond(tmp_path, 1, small, 1, ("priority", "mixed"), said.append)
    assert again == rows and len(said) == 2
    with pytest.raises(DataError, match="other settings"): beyond(tmp_path, 1, Budget(), 1, ("priority",))

def test_unknown_backbone():
    with pytest.raises(BackboneError, match="llama"): _warm_folder("bert")
    assert _tiny_neox(50).num_parameters() < 200_000

"Memory across backbones: crossings, their table, and the runs on tiny budgets."
import pytest

from comam_nb.base.errors import BackboneError
from comam_nb.studies.crossing import BACKBONES, beyond, cross, memory_transfer, tiny_neox, transfer_table, warm_folder
from comam_nb.base.errors import DataError
from comam_nb.microworld import MicroWorld, make_episodes
from comam_nb.worlds.warm_start import micro_agents, micro_rewards
from comam_nb.studies.ablation import Budget

def test_a_crossing_takes_its_reader_from_the_other_team():
    A, B = ({n: f"{t}-{n}" for n in ("extraction", "profile", "retrieval")} for t in "AB")
    assert cross(A, B) == {"extraction": "A-extraction", "profile": "A-profile", "retrieval": "B-retrieval"}
    assert cross(A, A) == A

def test_both_backbones_read_and_write():
    "Every crossing answers more than a guess among ten values."
    world = MicroWorld()
    teams = {n: micro_agents(world, folder=warm_folder(n)) for n in BACKBONES}
    assert len({t["profile"].policy.model.config.model_type for t in teams.values()}) == 2
    right = memory_transfer(teams, make_episodes(world, 60, held_out=True), micro_rewards(world))
    assert set(right) == {(a, b) for a in BACKBONES for b in BACKBONES} and all(v.mean() > 0.2 for v in right.values())

def test_the_transfer_table_by_hand():
    "Two seeds, two teams. B answers .5 and .75 from its own memory, 0 and .25 from A's: a lead of .5 in both, without spread."
    row = lambda seed, bits: dict(kind="transfer", seed=seed, right=[dict(builder=a, reader=b, bits=x) for (a, b), x in bits.items()])
    names, mean, half, lead, lead_half = transfer_table([row(0, {("A", "A"): "1111", ("A", "B"): "0000", ("B", "A"): "1100", ("B", "B"): "1100"}),
                                                         row(1, {("A", "A"): "1111", ("A", "B"): "1000", ("B", "A"): "1000", ("B", "B"): "1110"})])
    assert names == ["A", "B"] and mean.tolist() == [[1, .125], [.375, .625]]
    assert (lead[0, 1], lead_half[0, 1]) == (.5, 0) and lead[1, 0] == pytest.approx(.625)
    assert half[0, 1] == pytest.approx(12.7062 * 0.125, rel=1e-3) # t with one degree of freedom, standard error 0.125

def test_runs_are_resumed(tmp_path):
    said, small = [], Budget(steps=1, episodes_per_step=1, group_size=4, eval_episodes=4)
    rows = beyond(tmp_path, 1, small, 1, ("priority", "mixed"), said.append)
    assert [r["kind"] for r in rows] == ["priority", "mixed"] and len(said) == 2
    again = beyond(tmp_path, 1, small, 1, ("priority", "mixed"), said.append)
    assert again == rows and len(said) == 2
    with pytest.raises(DataError, match="other settings"): beyond(tmp_path, 1, Budget(), 1, ("priority",))

def test_unknown_backbone():
    with pytest.raises(BackboneError, match="llama"): warm_folder("bert")
    assert tiny_neox(50).num_parameters() < 200_000

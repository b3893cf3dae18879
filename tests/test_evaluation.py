"Evaluating a team, and the plots of its runs."
import numpy as np
import pytest
import torch

from comam_nb.base.errors import DataError
from comam_nb.base.statistics import bootstrap
from comam_nb.data import example_episode
from comam_nb.mdp import AGENTS, example_agents
from comam_nb.rl.evaluation import before_after, evaluate
from comam_nb.runs.folder import Run
from comam_nb.studies.plots import (line_look, plot_bands, plot_heat, plot_rewards, plot_timeline, plot_weights)

NAMES = ["answer_accuracy", "r_cons_f", "r_cons_c", "r_ret"]


def rewards(groups):
    local = [[[i + float(t[a].action.malformed == 0) for t in g] for i, a in enumerate(AGENTS)] for g in groups]
    return torch.tensor(local), torch.tensor([[float(t.final.answer == t.episode.answer) for t in g] for g in groups])


def test_each_metric_is_its_own_and_the_random_state_stays():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    scores = evaluate(example_agents(), [example_episode()] * 4, rewards)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert list(scores) == NAMES and scores["answer_accuracy"].tolist() == [1, 1, 0, 0]
    assert scores["r_cons_f"].tolist() == [1, 1, 1, 0]
    for i, name in enumerate(NAMES[1:]): assert ((i <= scores[name]) & (scores[name] <= i + 1)).all()


def test_before_and_after_is_a_paired_comparison():
    before = {n: np.array([0., 1, 0, 1]) for n in NAMES}
    after = before | {"r_ret": np.array([1., 1, 0, 1])}
    lines = before_after(before, after).splitlines()
    assert [l.split()[0] for l in lines[1:]] == NAMES and lines[1].endswith("0.000 [0.000, 0.000]")
    assert lines[4].endswith(str(bootstrap([1, 0, 0, 0])))


def test_plots_draw_what_they_are_given():
    import matplotlib.pyplot as plt
    ax = plot_bands(None, {"x": np.ones((3, 5)), "y": ([10, 20], np.zeros((2, 2)))}, smooth=2, ylabel="right")
    assert len(ax.lines) == 2 and len(ax.collections) == 2 and ax.get_ylabel() == "right"
    assert ax.lines[0].get_linestyle() != ax.lines[1].get_linestyle() and list(ax.lines[1].get_xdata()) == [10, 20]
    assert np.allclose(ax.lines[0].get_ydata(), 1)
    ax = plot_heat([[0, 2], [1, np.nan]], ["a", "b"], ["c", "d"])
    assert sorted(t.get_text() for t in ax.texts) == ["0", "1", "2"]
    plot_heat(np.zeros((1, 1)), ["a"], ["b"])
    plt.close("all")


def test_a_timeline_is_held_from_stored_to_gone():
    import matplotlib.pyplot as plt
    long = "x" * 60
    ax = plot_timeline([(1, "stored", long), (2, "superseded", long), (4, "stored", long), (3, "used", "y"),
                        (5, "stored", "z")])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["x" * 47 + "…", "y", "z"]
    assert [list(l.get_xdata()) for l in ax.lines] == [[1, 2], [4, 5.5], [5, 5.5]]
    plt.close("all")


def test_lines_look_different():
    looks = [tuple(line_look(i).values()) for i in range(8)]
    assert len(set(looks)) == 8 and line_look(8) == line_look(0)


def test_plots_refuse_what_they_cannot_draw():
    with pytest.raises(DataError, match=r"shape \(1, 2\)"): plot_heat([[1, 2]], ["a"], ["b"])
    with pytest.raises(DataError, match="unknown event 'lost'.*stored, superseded, forgotten, used"):
        plot_timeline([(1, "lost", "x")])


def test_a_runs_log_is_drawn(tmp_path):
    import json
    import matplotlib.pyplot as plt
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(
        {"step": i, **{n: i / 12 for n in NAMES}, **{f"w_{a}": 1 / 3 for a in AGENTS}}) + "\n" for i in range(1, 13)))
    metrics = Run(tmp_path).metrics()
    ax = plot_rewards(metrics)
    means_of_ten = [5.5 / 12, 6.5 / 12, 7.5 / 12]
    assert len(ax.lines) == 8 and np.allclose(ax.lines[7].get_ydata(), means_of_ten)
    assert len(plot_weights(metrics).lines) == 7
    plt.close("all")

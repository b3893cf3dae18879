"""comam_nb.agents and comam_nb.mdp: what travels with a state, what a parser may see, files that are whole."""
import json
from dataclasses import replace

import pytest

from comam_nb.agents import Action, ExtractionAgent, Note, ProfileAgent, RetrievalAgent, act, nearest
from comam_nb.base.embedders import HashingEmbedder
from comam_nb.base.errors import DataError
from comam_nb.data import Query, example_episode
from comam_nb.mdp import (AGENTS, MemoryMDP, Scripted, State, Trajectory, example_agents, example_group,
                          read_trajectories, rollout, write_trajectories)

class Counting(HashingEmbedder):
    "Remembers what it was asked to embed."
    def __init__(self): super().__init__(); self.asked = []
    def __call__(self, texts): self.asked.append(list(texts)); return super().__call__(texts)

def team(embedder, k=1):
    agents = example_agents()
    agents["retrieval"] = RetrievalAgent(agents["retrieval"].policy, k=k, embedder=embedder)
    return agents

# ---------------------------------------------------------------- candidates are looked up once

def test_a_group_asks_the_embedder_once():
    embedder = Counting()
    [group] = rollout(team(embedder), [example_episode()], G=8)
    assert len(embedder.asked) == 1 # once for the prompt and once for the parser of each large memory before: 12
    [texts] = embedder.asked
    assert len(texts) == len(set(texts)) and texts.count("What is my favourite drink?") == 1
    assert all(t["retrieval"].state.shown is not None for t in group)

def test_what_is_shown_is_what_was_looked_up_alone():
    "Looking for eight states at once finds what looking for each of them finds."
    agents = team(Counting(), k=2)
    groups = rollout(agents, [example_episode(), replace(example_episode(), query=Query("Where do I work?"))], G=4)
    for t in (t for g in groups for t in g):
        state = replace(t["retrieval"].state, shown=None)
        notes = (*state.fine, *state.coarse)
        alone = tuple(notes[i] for i in nearest(notes, state.query.text, 2, HashingEmbedder()))
        assert t["retrieval"].state.shown == alone == agents["retrieval"].candidates(state)
        assert t["retrieval"].prompt == agents["retrieval"].prompt(state)

def test_several_questions_to_one_memory_embed_it_once():
    embedder, notes = Counting(), tuple(Note(f"Fact {i}.", (i,)) for i in range(30))
    states = [State(2, fine=notes, query=Query(q)) for q in ("Fact 3?", "Fact 4?", "Fact 3?")]
    agent = RetrievalAgent(Scripted([""]), k=2, embedder=embedder)
    act(agent, states)
    assert len(embedder.asked) == 1 and sorted(embedder.asked[0]) == sorted([*(n.text for n in notes), "Fact 3?",
        "Fact 4?"])

def test_looking_up_twice_asks_once_and_a_small_memory_never():
    embedder, agent = Counting(), None
    agent = RetrievalAgent(k=1, embedder=embedder)
    state = State(2, fine=(Note("Tea."), Note("Cat.")), query=Query("Drink tea?"))
    [seen] = agent.look_up([state])
    assert agent.look_up([seen]) == [seen] and seen.shown == (Note("Tea."),) and len(embedder.asked) == 1
    agent.prompt(seen), agent.parse("", seen)
    assert len(embedder.asked) == 1
    [small] = RetrievalAgent(k=2, embedder=embedder).look_up([state])
    assert small.shown == state.fine and len(embedder.asked) == 1

def test_what_was_shown_is_no_part_of_the_decision_process():
    a, b = State(2, query=Query("?")), State(2, query=Query("?"), shown=(Note("x"),))
    assert a == b and hash(a) == hash(b) and "shown" not in repr(b)

# ---------------------------------------------------------------- trajectories as files

def test_a_trajectory_survives_json():
    for t in example_group():
        t["profile"].reward, t.answer_reward = 0.25, 1.0
        assert Trajectory.from_json(json.loads(json.dumps(t.to_json()))) == t

def test_an_intervention_is_replayed():
    perfect = lambda episode, agent, state, action: Action(notes=(Note("Tea.", (7,)),
        )) if agent == "extraction" else action
    [group] = rollout(example_agents(), [example_episode()], G=2, intervene=perfect)
    back = Trajectory.from_json(group[1].to_json(), perfect)
    assert back == group[1] and back["profile"].state.fine == (Note("Tea.", (7,)),)

def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "group.jsonl"
    write_trajectories(path, example_group())
    before = path.read_bytes()
    with pytest.raises(AttributeError): write_trajectories(path, [*example_group(), "no trajectory"])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["group.jsonl"]
    assert read_trajectories(path) == example_group()

@pytest.mark.parametrize("line", ["{", "[]", '{"episode": {}}', '{"transitions": []}'])
def test_a_broken_line_is_named(tmp_path, line):
    path = write_trajectories(tmp_path / "group.jsonl", example_group()[:1])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match="line 2: not a trajectory"): read_trajectories(path)

# ---------------------------------------------------------------- the process itself

def test_three_steps_and_the_end():
    "CoMAM §4.2."
    mdp = MemoryMDP(example_episode())
    s = mdp.reset()
    for name in AGENTS:
        assert s.agent == name and not s.done
        s = mdp.step(s, Action())
    assert s.done and s.agent is None
    with pytest.raises(ValueError, match="over"): mdp.step(s, Action())

# ---------------------------------------------------------------- thinking is not acting

THOUGHTS = ["<think>\n{0}\n</think>\n", "{0}\n</think>\n", "<think>{0}</think> <think>{0}</think>"]

@pytest.mark.parametrize("thought", THOUGHTS)
def test_what_is_thought_is_not_answered_or_cited(thought):
    "Both would count before: the first <final_answer> of the whole text was taken, and every [n] before a note."
    wrong = "Perhaps <information> [1] </information> <final_answer> coffee </final_answer>? No, see [2]."
    right = "<information> [2] </information> <final_answer> tea </final_answer>"
    state = State(2, fine=(Note("coffee", (3,)), Note("tea", (7,))), query=Query("What?"))
    [[d]] = act(RetrievalAgent(Scripted([thought.format(wrong) + right])), [state])
    assert d.action == Action(evidence=frozenset({7}), answer="tea", used=(2,))
    assert d.sample.text == thought.format(wrong) + right # what was sampled is what is trained

    [[d]] = act(ExtractionAgent(Scripted([thought.format("Drinks coffee. [3]") + "Drinks tea. [7]"])),
                [MemoryMDP(example_episode()).reset()])
    assert d.action == Action(notes=(Note("Drinks tea.", (7,)),))

def test_a_thought_that_was_cut_off_says_nothing():
    state = State(1, fine=(Note("Drinks tea.", (7,)),))
    [[d]] = act(ProfileAgent(Scripted(["<think>Likes tea. [1]"])), [state])
    assert d.action == Action()


# ---------------------------------------------------------------- what agents write

@pytest.mark.parametrize("dress", ["[3]", "【3】", "［3］", "[turn 3]", "(3)", "[#3]", "[line 3].", "[2-3]"])
def test_facts_come_without_their_brackets(dress):
    state = State(0, history=example_episode().history)
    [note] = ExtractionAgent().parse(f"- The drink is coffee. {dress}", state).notes
    assert note.text.rstrip(".") == "The drink is coffee" and 3 in note.cites
    fine = tuple(Note(f"Fact {i}.", (i,)) for i in (2, 4, 6))
    [trait] = ProfileAgent().parse(f"Likes drinks {dress}", State(1, fine=fine)).notes
    assert trait.text.rstrip(".") == "Likes drinks" and 6 in trait.cites
    text = f"<information> Fact 6. {dress} </information> <final_answer> six </final_answer>"
    action = RetrievalAgent().parse(text, State(2, fine=fine, query=Query("?")))
    assert 3 in action.used and 6 in action.evidence and action.malformed == 0

def test_thinking_is_no_fact_wherever_a_parser_is_called():
    state = State(0, history=example_episode().history)
    text = "<think>\nThe drink is coffee. [3]\n</think>\nThe drink is tea. [7]"
    assert [n.cites for n in ExtractionAgent().parse(text, state).notes] == [(7,)]

@pytest.mark.parametrize("n", [2, 11, 26])
def test_all_options_are_shown(n):
    options = tuple(f"city {i}" for i in range(n))
    prompt = RetrievalAgent().prompt(State(2, fine=(Note("x", (1,)),), query=Query("Where?"), options=options))
    assert prompt.endswith("".join(f"\n({chr(97 + i)}) city {i}" for i in range(n)) + "\nAnswer:\n")

def test_more_options_than_letters():
    with pytest.raises(DataError, match="27 options, but letters name only 26"):
        RetrievalAgent().prompt(State(2, query=Query("Where?"), options=("x",) * 27))

# ---------------------------------------------------------------- a process of one's own

class FourSteps(MemoryMDP):
    "Retrieval hands on what it named, and a reader answers from that."
    agents = (*AGENTS, "reader")
    def transition(self, state, action):
        if state.agent == "retrieval":
            named = tuple(state.shown[n - 1] for n in action.used)
            return replace(state, step=3, shown=named, evidence=action.evidence)
        if state.agent == "reader": return replace(state, step=4, answer=action.answer)
        return super().transition(state, action)

def test_a_rollout_needs_agents_and_rollouts():
    from comam_nb.rl.evaluation import evaluate
    for agents, G, says in ((example_agents(), 0, "G must be 1"), ({}, 1, "no agent 'extraction'")):
        with pytest.raises(DataError, match=says): rollout(agents, [example_episode()], G)
    with pytest.raises(DataError, match="no episodes"): evaluate(example_agents(), [], None)

def test_a_team_brings_its_process_with_a_fourth_agent():
    from comam_nb.rl.evaluation import evaluate
    from comam_nb.rl.team import Team
    class Reader(RetrievalAgent): name = "reader"
    reader = Reader(Scripted(["<information> [1] </information> <final_answer> mint tea </final_answer>"]))
    four = Team({**example_agents(), "reader": reader}, trained=(), process=FourSteps)
    seen = []
    [[t]] = rollout(four, [example_episode()], 1, intervene=lambda e, name, s, a: seen.append(name) or a)
    assert seen == [x.agent for x in t.transitions] == [*AGENTS, "reader"]
    assert [n.text for n in t["reader"].state.shown] == ["The favourite drink is tea."] # retrieval named line 2 of 3
    assert (t.final.done, t.final.agent, t.final.answer, t.final.evidence) == (True, None, "mint tea", frozenset({7}))
    with pytest.raises(ValueError, match="over"): FourSteps(t.episode).step(t.final, Action())
    assert Trajectory.from_json(json.loads(json.dumps(t.to_json())), process=FourSteps) == t
    with pytest.raises(ValueError, match="name the process"): Trajectory.from_json(t.to_json())
    rewards = lambda groups: ([[[1.0] for _ in FourSteps.agents] for _ in groups], [[0.0] for _ in groups])
    scores = evaluate(four, [example_episode()], rewards)
    assert list(scores) == ["answer_accuracy", "r_cons_f", "r_cons_c", "r_ret", "r_reader"]
    assert [x.agent for x in rollout(example_agents(), [example_episode()], 1)[0][0].transitions] == list(AGENTS)

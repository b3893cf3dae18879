"The six baselines as whole systems: in the micro-world with its tiny policies, and with generated conversations."
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from comam_nb.agents import ExtractionAgent, Note, ProfileAgent, RetrievalAgent, render_notes
from comam_nb.lm.backbone import prompt_ids
from comam_nb.systems.amem import AMem, _keywords
from comam_nb.systems.plain import Base, RAG, _chunks
from comam_nb.systems.cam import CAM
from comam_nb.systems.mem1 import Mem1, SYSTEMS
from comam_nb.systems.memorybank import MemoryBank, _retention
from comam_nb.systems.interface import MemorySystem, chosen_option, most, turns
from comam_nb.base.errors import DataError
from comam_nb.data import Message, Query, Session, example_episode, make_history
from comam_nb.mdp import Scripted, State
from comam_nb.microworld import MicroWorld, make_episodes
from comam_nb.worlds.warm_start import micro_agents

each_system = pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
WORLD = MicroWorld()
QUESTION = "What is my favourite drink?"

@pytest.fixture(scope="module")
def agents(): return micro_agents(WORLD)

def scripted(facts="A fact. [1]", profile="A line. [1]",
             answer="<information> [1] </information> <final_answer> tea </final_answer>"):
    as_list = lambda x: [x] if isinstance(x, str) else x
    return {"extraction": ExtractionAgent(Scripted(as_list(facts))),
            "profile": ProfileAgent(Scripted(as_list(profile))),
            "retrieval": RetrievalAgent(Scripted(as_list(answer)))}

def remember(system, history):
    for s in history: system.observe(s)
    return system

class Recorder:
    "A policy that keeps the prompts it was given."
    def __init__(self, policy): self.policy, self.prompts = policy, []
    def complete(self, prompts, **kwargs): self.prompts += prompts; return self.policy.complete(prompts, **kwargs)

class Table:
    "Texts to given unit vectors; other texts to the zero vector."
    name = "table"
    def __init__(self, vectors):
        self.vectors = {t: np.asarray(v, np.float32) / np.linalg.norm(v) for t, v in vectors.items()}
        self.dim = len(next(iter(vectors.values())))
    def __call__(self, texts): return np.stack([self.vectors.get(t, np.zeros(self.dim, np.float32)) for t in texts])


# every system

@each_system
def test_runs_in_the_micro_world_and_its_evidence_comes_from_the_history(system, agents):
    for e in make_episodes(WORLD, 3, held_out=True):
        m = remember(system(agents), e.history)
        a = m.answer(e.query)
        numbers = {t.turn for t in e.turns}
        assert a.text and a.option is None and set(a.evidence) <= set(m.shown) <= set(m.memory())
        assert all(set(n.cites) <= numbers for n in m.memory()) and all(n.cites for n in a.evidence)
        assert m.left_out == 0 and m.sessions == 2
        # here, the raw text fits as a whole
        assert e.evidence <= {t for n in m.shown for t in n.cites} or system not in (Base, RAG)
        assert m.usage.calls >= 1 and m.usage.prompt_tokens > 0 and m.usage.completion_tokens > 0

@each_system
def test_two_users_never_mix_and_agents_are_left_as_they_were(system, agents):
    (one, two), k = make_episodes(WORLD, 2, seed=1), agents["retrieval"].k
    alone = remember(system(agents), one.history); said = alone.answer(one.query)
    first, second = system(agents), system(agents)
    for s, t in zip(one.history, two.history): first.observe(s); second.observe(t)
    second.answer(two.query)
    assert first.answer(one.query) == said and first.memory() == alone.memory()
    fresh = remember(system(agents), two.history); fresh.answer(two.query)
    assert second.memory() == fresh.memory() != first.memory()
    assert agents["retrieval"].k == k

@each_system
def test_bad_input_is_refused_and_changes_nothing(system):
    m = system(scripted())
    with pytest.raises(DataError, match="the history is empty: observe"): m.answer(QUESTION)
    remember(m, example_episode().history)
    before = m.memory()
    for text in ("", " \n"):
        with pytest.raises(DataError, match="the text is empty"): m.answer(text)
    with pytest.raises(DataError, match="session 's9' is empty"): m.observe(Session("s9", ()))
    with pytest.raises(DataError, match="turns without a number"): m.observe(Session("s9", [Message("user", "Hi")]))
    assert m.memory() == before and m.sessions == 2
    with pytest.raises(DataError, match="recall 1 note or more"): system(scripted(), k=0)

@each_system
def test_a_reader_that_writes_nonsense_is_no_error(system):
    m = remember(system(scripted(answer="tea, I think")), example_episode().history)
    a = m.answer(QUESTION, ("coffee", "tea"))
    assert a.text == "tea, I think" and a.option is None and a.evidence == () and m.usage.malformed > 0

@each_system
def test_agents_that_write_nothing_leave_an_empty_memory_that_can_be_asked(system):
    m = remember(system(scripted(facts="", profile="")), example_episode().history)
    m.answer(QUESTION)
    assert m.memory() == () if system not in (Base, RAG) else m.memory()

@each_system
def test_options_reach_the_reader_and_the_letter_comes_back(system):
    agents = scripted(answer="<information> [1] </information> <final_answer> (b) </final_answer>")
    agents["retrieval"].policy = Recorder(agents["retrieval"].policy)
    a = remember(system(agents), example_episode().history).answer(Query(QUESTION), ["coffee", "tea"])
    assert a.option == "b" and "(a) coffee\n(b) tea" in agents["retrieval"].policy.prompts[-1]

@each_system
def test_observing_after_an_answer_goes_on_with_the_same_memory(system):
    m = system(scripted(facts=["The drink is coffee. [3]", "The drink is tea. [3]"]))
    first, second = example_episode().history
    m.observe(first); m.answer(QUESTION); m.observe(second); m.answer(QUESTION)
    assert max(t for n in m.memory() for t in n.cites) > 4 # the second session is turns 5 to 8

def test_systems_are_named_by_their_class():
    assert list(SYSTEMS) == ["base", "rag", "memorybank", "amem", "cam", "mem1"]
    assert all(issubclass(s, MemorySystem) and s.name == n for n, s in SYSTEMS.items())
    # says what it leaves out
    assert all("arXiv" in s.__doc__ and "Without" in s.__doc__ for s in SYSTEMS.values() if s not in (Base, RAG))

def test_a_long_session_is_split_and_every_turn_is_read():
    history = make_history([[("user", f"fact number {i} " + "word " * 20) for i in range(40)]])
    for system in (MemoryBank, AMem, CAM, Mem1):
        agents = scripted(facts="A fact. [1]")
        agents["extraction"].policy = Recorder(agents["extraction"].policy)
        m = remember(system(agents, context=200), history)
        read = agents["extraction"].policy.prompts
        assert m.usage.calls == len(read) > 4 and all(len(p.split()) <= 200 for p in read)
        assert all(any(f"fact number {i} " in p for p in read) for i in range(40))


# what is read

@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(70, 300))
def test_base_reads_the_longest_end_of_the_conversation_that_fits(lengths, context):
    history = make_history([[("user", "w " * n) for n in lengths]])
    agents = scripted()
    agents["retrieval"].policy = Recorder(agents["retrieval"].policy)
    m = remember(Base(agents, context=context), history)
    m.answer(QUESTION)
    [prompt] = agents["retrieval"].policy.prompts
    # role and number are words, too
    shown, words = len(m.shown), lambda n: sum(l + 2 for l in lengths[len(lengths) - n:])
    assert [n.cites for n in m.shown] == [(t,) for t in range(len(lengths) - shown + 1, len(lengths) + 1)]
    assert len(prompt.split()) <= context and m.left_out == len(lengths) - shown
    assert shown == len(lengths) or words(shown + 1) > context - 32 # 32: the prompt with this question, counted by hand

@each_system
def test_no_prompt_exceeds_the_context_of_a_real_tokenizer(system, agents):
    "Conversations of 700 tokens and more, a model that reads 512."
    policy, n = agents["retrieval"].policy, agents["retrieval"].max_new_tokens
    history = make_history([[("user", f"I love the {s}"), ("assistant", "Noted")] * 16 for s in ("food sushi",
        "drink tea", "pet cat", "film drama")])
    m = remember(system(agents), history)
    m.answer("What is my favourite pet?")
    words = "\n".join(t.text for s in history for t in turns(s))
    assert len(policy.tokenizer(words).input_ids) > 700
    assert len(prompt_ids(policy, render_notes(m.shown))) + n < policy.context_length
    if system is Base:
        assert m.left_out > 0 and m.shown[-1].cites == (128,) and len(prompt_ids(policy, render_notes(m.shown))) > 400

def test_an_item_that_does_not_fit_is_an_error_with_a_way_out():
    m = remember(Base(scripted(), context=40), make_history([[("user", "w " * 100)]]))
    with pytest.raises(DataError, match=r"base: not one memory item fits beside the question \(102 of 8 free\)"):
        m.answer(QUESTION)
    with pytest.raises(DataError, match=r"base: the retrieval agent's prompt leaves -\d+ of 20 tokens or words"):
        remember(Base(scripted(), context=20), example_episode().history).answer(QUESTION)

@given(st.integers(0, 50), st.integers(0, 60))
def test_most(n, limit): assert most(n, lambda m: m <= limit) == min(n, limit)

def test_an_option_is_chosen_by_letter_or_whole_text():
    options = ("Hot tea", "cold tea", "none")
    assert [chosen_option(x, options) for x in ("(c)", "C", "a)", "B: cold", " hot  TEA. ", "tea", "d", "(d)",
                                                "because")] == ["c", "c", "a", "b", "a", None, None, None, None]


# RAG

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 25), min_size=1, max_size=15), st.integers(1, 12))
def test_chunks_keep_every_word_in_order_and_cite_where_it_came_from(lengths, size):
    notes = [Note(" ".join(f"t{t}w{i}" for i in range(n)), (t,)) for t, n in enumerate(lengths, 1)]
    cut = _chunks(notes, lambda text: len(text.split()), size)
    assert [w for c in cut for w in c.text.split()] == [w for n in notes for w in n.text.split()]
    assert all(len(c.text.split()) <= size for c in cut)
    assert all({int(w[1:w.index("w")]) for w in c.text.split()} == set(c.cites) and len(set(c.cites)) == len(c.cites)
               for c in cut)

def test_rag_chunks_take_their_part_of_a_small_context(agents):
    m = RAG(agents)
    count, room = m.calls.room("retrieval", State(2, query=Query("?")))
    assert m.chunk == room * 3 // 4 // 3 and m.chunk * 3 < 512
    assert RAG(agents, chunk=10).chunk == 10
    with pytest.raises(DataError, match="chunk is 0"): RAG(agents, chunk=0)

def test_rag_agrees_with_brute_force(agents):
    for e in make_episodes(WORLD, 3):
        m = remember(RAG(agents, chunk=16, k=2), e.history)
        m.answer(e.query)
        v = m.embedder([c.text for c in m.memory()] + [e.query.text])
        best = sorted(range(len(v) - 1), key=lambda i: -float(v[i] @ v[-1]))[:2]
        assert m.shown == tuple(m.memory()[i] for i in sorted(best))


# MemoryBank

def test_forgetting_curve_by_hand():
    for t, S, R in ((0, 1, 1), (1, 1, .36788), (2, 1, .13534), (2, 2, .36788), (1, 5, .81873), (math.log(2), 1, .5)):
        assert _retention(t, S) == pytest.approx(R, abs=1e-5)

def test_a_fact_that_nobody_asks_for_is_gone_after_twelve_sessions():
    m = MemoryBank(scripted(facts=["The one fact. [1]"] + [""] * 20, profile=""))
    left = []
    for s in make_history([[("user", "Hello.")]] * 14): m.observe(s); left.append(len(m.traces))
    assert left == [1] * 12 + [0] * 2 # e^(-0.2 * 11) = .111, e^(-0.2 * 12) = .091

def test_recall_strengthens_and_starts_the_clock_anew():
    m = MemoryBank(scripted(facts=["Tea is what I drink. [1]\nA cat is what I have. [1]"] + [""] * 5, profile=""),
                   pace=1.0, k=1)
    sessions = iter(make_history([[("user", "Hello.")]] * 6))
    m.observe(next(sessions)); m.observe(next(sessions)) # R = e^-1 for both
    for _ in range(2): m.answer("what do I drink, tea?")
    assert [(t.note.text[:3], t.strength, t.since) for t in m.traces] == [("Tea", 3, 2), ("A c", 1, 1)]
    m.observe(next(sessions)); assert len(m.traces) == 2 # R = e^(-1/3), e^-2 = .135
    m.observe(next(sessions)); assert len(m.traces) == 1 # e^-3 = .05 is forgotten
    m.observe(next(sessions)); m.observe(next(sessions)); assert len(m.traces) == 1 # e^(-4/3) = .26

def test_the_summary_rests_on_what_is_left():
    m = MemoryBank(scripted(facts=["Old. [1]", "", "", "", "", "New. [1]"], profile="A line. [1]"), pace=1.0)
    h = make_history([[("user", "Hello.")]] * 6) # recalled once, S = 2: e^(-4/2) = .135 is kept, e^(-5/2) = .082 is not
    remember(m, h[:1]).answer(QUESTION); assert m.summary == [Note("A line.", (1,))]
    remember(m, h[1:]).answer(QUESTION); assert m.summary == [Note("A line.", (6,))] and len(m.memory()) == 2


# A-Mem

def test_links_are_symmetrical_bounded_and_follow_the_threshold(agents):
    for e in make_episodes(MicroWorld(facts=8, budget=8), 4):
        m = remember(AMem(agents, links=2, near=0.3), e.history)
        for i, s in enumerate(m.slips):
            assert i not in s.links and all(i in m.slips[j].links for j in s.links)
            assert sum(j < i for j in s.links) <= 2
    assert all(not s.links for s in remember(AMem(agents, near=1.1), e.history).slips)

def test_evolution_reaches_old_neighbours_only():
    m = remember(AMem(scripted(facts="Drinks coffee at work. [1]\nHas a cat. [1]\nDrinks tea at work. [1]"), k=2),
                 example_episode().history[:1])
    assert [s.keywords for s in m.slips] == [("drinks", "coffee", "work", "tea"), ("cat",), ("drinks", "tea", "work")]
    assert [s.links for s in m.slips] == [{2}, set(), {0}]
    m.answer("coffee at work")
    assert [n.text for n in m.shown] == ["Drinks coffee at work.", "Drinks tea at work."]

def test_keywords_are_words_once_without_filler():
    assert _keywords("The user has a cat, and the Cat is called Miso.") == ("cat", "called",
        "miso") and _keywords("") == ()


# CAM

def clusters(*vectors, **kwargs):
    names = [f"note {i}" for i in range(len(vectors))]
    m = CAM(scripted(facts="\n".join(f"{n} [1]" for n in names)), embedder=Table(dict(zip(names, vectors))), **kwargs)
    return remember(m, example_episode().history[:1])

def test_assimilation_and_accommodation_by_hand():
    # cosines .6 with the first, .8 with the second
    assert [c.members for c in clusters((1, 0), (3, 4), (0, 1), near=.61).clusters] == [[0], [1, 2]]
    # the centre is (2, 1)/√5: .447 to the third
    assert [c.members for c in clusters((1, 0), (3, 4), (0, 1), near=.59).clusters] == [[0, 1], [2]]
    assert [c.members for c in clusters((1, 0), (0, 1), (1, 1), near=.7).clusters] == [[0, 2], [1, 2]] # .707 to both
    assert [c.members for c in clusters((1, 0), (0, 1), (1, 1), near=.7, overlap=1).clusters] == [[0, 2], [1]]

def test_only_clusters_that_changed_are_summarised_again():
    m = clusters((1, 0), (0, 1), near=.7)
    m.answer("note 0"); assert m.usage.calls == 1 + 2 + 1 # extraction, two themes, answer
    m.agents["extraction"].policy = Scripted(["note 0 [3]"])
    m.observe(example_episode().history[1]); m.answer("note 0")
    assert m.usage.calls == 4 + 1 + 1 + 1 and [c.members for c in m.clusters] == [[0, 2], [1]]

def test_prune_and_grow_brings_the_theme_and_nothing_else():
    m = clusters((1, 0, 0), (9, 4, 0), (0, 0, 1), (0, 1, 9), near=.7, seeds=1)
    m.answer("note 0")
    assert [n.text for n in m.shown] == ["note 0", "note 1", "A line."]

@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.integers(-9, 9)] * 3).filter(any), min_size=1, max_size=8), st.floats(-.9, .99),
       st.integers(1, 3))
def test_every_note_has_a_home_and_at_most_overlap_of_them(vectors, near, overlap):
    m = clusters(*vectors, near=near, overlap=overlap)
    homes = [sum(i in c.members for c in m.clusters) for i in range(len(m.notes))]
    assert len(homes) == len(vectors) and all(1 <= h <= overlap for h in homes)
    assert all(c.members == sorted(set(c.members)) for c in m.clusters)


# Mem1

def test_mem1_holds_one_state_of_constant_size(agents):
    "Ten sessions, a new favourite each: never more lines or tokens than the agent may write at once."
    agent, m = agents["extraction"], Mem1(agents)
    for s in make_history([[("user", x.content) for x in e.turns if x.role == "user"] for e in make_episodes(WORLD,
        10)]):
        m.observe(s)
        assert len(m.memory()) <= agent.budget
        assert len(agent.policy.tokenizer(" ".join(n.text for n in m.memory())).input_ids) <= agent.max_new_tokens
    # nothing else is kept
    assert {k for k in vars(m) if isinstance(vars(m)[k], (list, tuple)) and vars(m)[k]} == {"state"}

def test_mem1_copies_keep_their_turns_and_an_empty_rewriting_keeps_the_state():
    m = Mem1(scripted(facts=["A. [1]\nB. [1, 2]", "B. [2]\nC. [1, 3]", "no citation", ""]))
    h = make_history([[("user", "x"), ("user", "y")]] * 4)
    states = [(m.observe(s), m.memory())[1] for s in h]
    assert states[0] == (Note("A.", (1,)), Note("B.", (1, 2)))
    assert states[1] == (Note("B.", (1, 2)), Note("C.", (1, 3))) # line 3 is the first turn of the second session
    assert states[2] == states[3] == (Note("no citation", ()),)


def test_systems_that_share_their_acts_answer_and_cost_the_same():
    "One dictionary for two systems: the second asks its extraction agent nothing, and is charged all the same."
    from comam_nb.mdp import example_agents
    from comam_nb.data import example_episode
    asked = []
    class Counting:
        def complete(self, prompts, **kw):
            asked.extend(prompts)
            return ["The favourite drink is tea. [3]"] * len(prompts)
    agents = example_agents()
    agents["extraction"].policy = Counting()
    acts, alone, e = {}, SYSTEMS["amem"](agents), example_episode()
    alone.observe(e.history[1]); asked.clear()
    shared = [SYSTEMS[n](agents) for n in ("amem", "memorybank")]
    for s in shared: s.acts = acts; s.observe(e.history[1])
    assert len(asked) == 1
    assert alone.memory() == shared[0].memory() and [s.usage.calls for s in shared] == [alone.usage.calls] * 2
    warm = SYSTEMS["amem"](agents, temperature=0.5); warm.acts = acts; warm.observe(e.history[1])
    assert len(asked) == 2 # what is drawn is not shared
    assert alone.saved == 0 and shared[0].saved == 0 and shared[1].saved > 0 # the first one paid

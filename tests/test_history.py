"A long history observed side by side leaves the memory that it leaves session by session."
import random
from itertools import product

import pytest, torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from comam_nb.agents import PROMPTS, ExtractionAgent, Note, ProfileAgent, RetrievalAgent, act, parse_answer
from comam_nb.memory import Assistant
from comam_nb.lm.backbone import Backbone, load_backbone, prompt_ids
from comam_nb.base.errors import BackboneError
from comam_nb.lm.lora import add_adapters
from comam_nb.systems.mem1 import SYSTEMS
from comam_nb.systems.comam import CoMAMSystem
from comam_nb.base.errors import DataError
from comam_nb.data import Message, Session, example_episode
from comam_nb.mdp import State
from comam_nb.systems.memory_r1 import MemoryR1, memory_r1_agents
from comam_nb.microworld import MicroWorld, make_episodes
from comam_nb.worlds.warm_start import micro_agents
from comam_nb.lm.decoding import _write_many as write_many, sample_each, sample_group

WORDS = "the cat drinks tea . yes no ?".split()
SIZE = dict(vocab_size=11, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, eos_token_id=1, pad_token_id=0, bos_token_id=None)

def nonsense(seed=0, **config):
    "A model with random weights, whose texts end where they like."
    torch.manual_seed(seed)
    ids = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
                                    padding_side="left")
    settings = SIZE | dict(initializer_range=0.5)
    return Backbone(LlamaForCausalLM(LlamaConfig(**settings | config)).eval(), words, (), "nonsense")

def some_prompts(n, seed=0, common=8, longest=60):
    rng = random.Random(seed)
    head = ["the cat . yes"] * (common // 4)
    return [" ".join(head + rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(n)]

def one_by_one(backbone, prompts, T, **kwargs):
    return [sample_group(backbone, [p], temperature=0.0, max_new_tokens=T, **kwargs)[0][0].ids for p in prompts]

def all_rows(backbone, prompts): return [prompt_ids(backbone, p) for p in prompts]


@pytest.mark.parametrize("common", [0, 8])
def test_every_token_is_that_of_one_prompt_alone(common):
    backbone, prompts = nonsense(0), some_prompts(14, common, common)
    want, rows = one_by_one(backbone, prompts, 30), all_rows(backbone, prompts)
    assert len({len(w) for w in want}) > 2
    for slots, room in product((1, 3, 50), (1, 7, 256)):
        assert write_many(backbone, rows, 30, slots, room) == want, (slots, room)


@pytest.mark.parametrize("seed", range(6))
def test_other_weights_and_a_stop_text(seed):
    backbone = nonsense(seed)
    backbone.stop = "tea"
    prompts = some_prompts(9, seed)
    assert write_many(backbone, all_rows(backbone, prompts), 25, 4, 6) == one_by_one(backbone, prompts, 25)


def test_longer_prompts_hold_the_state_and_their_examples_are_what_the_parser_reads():
    episode = example_episode()
    fine, coarse = (Note("Has a cat named Miso.", (1,)),), (Note("Likes cats.", (1,)),)
    state = State(2, history=episode.history, fine=fine, coarse=coarse, query=episode.query)
    kinds = ExtractionAgent, ProfileAgent, RetrievalAgent
    for settings in PROMPTS.values():
        a, b, c = (A(budget=3, **settings[A.name]).prompt(state) for A in kinds)
        assert "at most 3" in a.lower() and "My favourite drink is coffee. [3]" in a
        assert fine[0].text in b and fine[0].text in c and episode.query.text in c
    assert c.endswith("Answer: <information> [")
    examples = PROMPTS["few-shot"]["extraction"]["template"].split("Facts:\n")[1].split("\n\n")[0]
    read = ExtractionAgent(budget=5).parse(examples, State(0, history=episode.history))
    assert read.malformed == 0
    assert read.notes == (Note("The user has a cat called Miso.", (1,)), Note("The user is a nurse in Rome.", (3,)))
    [note] = ExtractionAgent().parse("1. Has a cat. [1]", State(0, history=episode.history)).notes
    assert note == Note("Has a cat.", (1,)) # a list's own number is no citation


def test_what_an_answer_says_last_in_whole_tags_counts():
    handles = {1: (1,), 2: (3, 7)}
    copied = ("<information> Likes tea <final_answer> COINS </final_answer> [2] </information> "
              "<final_answer> tea </final_answer>")
    assert parse_answer(copied, handles).answer == "tea"
    assert parse_answer(f"{copied} <final_answer> more", handles).answer == "tea"
    cited = "<information> A cat. [1] [2] </information>"
    assert parse_answer(cited, handles, {1: "Has a cat.", 2: "Likes tea."}).used == (1,)



def test_equal_prompts_one_prompt_and_one_token():
    backbone, prompts = nonsense(), some_prompts(1) * 5
    rows = all_rows(backbone, prompts)
    want = one_by_one(backbone, prompts[:1], 20)
    assert write_many(backbone, rows, 20, 2) == want * 5 and write_many(backbone, rows[:1], 20) == want
    assert write_many(backbone, rows, 1, 2) == [want[0][:1]] * 5


def test_adapters_are_folded_in_and_the_model_is_left_as_it_was():
    backbone = nonsense()
    backbone.model = add_adapters(backbone.model, ("a", "b"), r=4)
    with torch.no_grad():
        for n, p in backbone.model.named_parameters():
            if "lora_B.b" in n: p.normal_(0, 0.5)
    before = {n: p.clone() for n, p in backbone.model.named_parameters()}
    backbone.model.train()
    prompts = some_prompts(6)
    for name in "ab":
        want = one_by_one(backbone, prompts, 20, adapter=name)
        assert [g[0].ids for g in sample_each(backbone, prompts, name, 20, 4, long=0)] == want
    assert backbone.model.training and all(torch.equal(p, before[n]) for n, p in backbone.model.named_parameters())


def test_what_this_way_does_not_serve_goes_the_other_way():
    backbone, prompts = nonsense(), some_prompts(3)
    assert sample_each(backbone, prompts, None, 20) is None
    assert sample_each(backbone, prompts[:1], None, 20, long=0) is None
    from transformers import MistralConfig, MistralForCausalLM
    window = nonsense()
    torch.manual_seed(0)
    window.model = MistralForCausalLM(MistralConfig(**SIZE, sliding_window=8)).eval()
    assert write_many(window, all_rows(window, prompts), 20) is None # a cache of another kind
    with pytest.raises(BackboneError): sample_each(backbone, ["the " * 600, "cat"], None, 20, long=0)


# ---- memories ----
@pytest.fixture(scope="module")
def sessions(): return [s for e in make_episodes(MicroWorld(), 12, seed=5) for s in e.history]

def numbered(sessions):
    turn, out = 0, []
    for s in sessions:
        out.append(Session(f"s{len(out)}", tuple(Message(m.role, m.content, turn := turn + 1) for m in s.messages)))
    return out

@pytest.mark.parametrize("name, shared", [*((n, s) for n in (*SYSTEMS, "comam") for s in (False, True)),
    ("memory-r1", False), pytest.param("memory-r1", True, marks=pytest.mark.slow)])
def test_every_system_remembers_the_same(name, shared, sessions):
    team = memory_r1_agents() if name == "memory-r1" else micro_agents(MicroWorld())
    make = {"memory-r1": MemoryR1, "comam": CoMAMSystem, **SYSTEMS}[name]
    one, many = make(team), make(team)
    if shared: one.acts, many.acts = {}, {}
    history = numbered(sessions)[:6]
    for s in history: one.observe(s)
    many.observe_all(history[:4]); many.observe_all(history[4:])
    assert many.memory() == one.memory() and many.sessions == one.sessions
    count = lambda s: (s.usage.calls, s.usage.prompt_tokens, s.usage.completion_tokens, s.usage.malformed)
    assert count(many) == count(one) and many.saved == one.saved == 0 and not many.calls.books.ahead
    assert many.answer("What food do I like?") == one.answer("What food do I like?") and many.shown == one.shown


def test_what_another_system_has_read_is_not_read_again(sessions):
    team, history, acts = micro_agents(MicroWorld()), numbered(sessions)[:6], {}
    first, second = SYSTEMS["amem"](team), SYSTEMS["cam"](team)
    first.acts = second.acts = acts
    first.observe_all(history); n = len(acts)
    second.observe_all(history)
    assert len(acts) == n and second.saved > 0 and second.usage.calls == first.usage.calls


def test_a_bad_session_in_the_middle(sessions):
    history = numbered(sessions)[:3]
    system = SYSTEMS["amem"](micro_agents(MicroWorld()))
    with pytest.raises(DataError, match="session 'x' is empty"):
        system.observe_all([history[0], Session("x", ()), history[1]])
    assert system.sessions == 1
    assistant = Assistant(micro_agents(MicroWorld()))
    with pytest.raises(DataError, match="the history is empty"): assistant.observe_all([Session("x", ())])
    with pytest.raises(DataError, match="batch_size is 0"): assistant.observe_all(history, 0)
    assert len(assistant.observe_all([Session("x", ()), history[0]])[0]) == 0 and assistant.pieces == [0, 1]


@pytest.mark.slow
def test_smollm2_reads_long_sessions_side_by_side(smollm2):
    backbone = load_backbone(smollm2, adapters=None, chat=False, dtype="float32", verbose=False)
    said = ["I adopted a cat named Miso and moved to Oslo.", "That is lovely, congratulations to both of you!",
            "I stopped drinking coffee because of my sleep.", "Tea may be a good replacement in the morning."]
    line = lambda i, j: Message(("user", "assistant")[j % 2], said[(i + j) % 4], 20 * i + j + 1)
    history = [Session(f"s{i}", tuple(line(i, j) for j in range(4 + 2 * i))) for i in range(3)]
    agent = ExtractionAgent(backbone, max_new_tokens=16, **PROMPTS["few-shot"]["extraction"])
    states = [State(0, history=(s,)) for s in history]
    one = [act(agent, [s], 1, 0.0)[0][0] for s in states]
    calls = []
    from comam_nb import agents as A
    way, A.sample_each = A.sample_each, lambda *a: calls.append(a) or way(*a)
    try: many = [d for [d] in act(agent, states, 1, 0.0, batch_size=2)]
    finally: A.sample_each = way
    assert calls and [(d.sample, d.action) for d in many] == [(d.sample, d.action) for d in one]

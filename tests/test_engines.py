"Engines that write in a policy's place: the library's continuous batching, and vLLM, of which a stand-in is asked."
from collections import Counter
from types import SimpleNamespace

import pytest, torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Lfm2Config, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, \
    PreTrainedTokenizerFast

from comam_nb.base.errors import BackboneError
from comam_nb.lm import engines
from comam_nb.lm.backbone import Backbone
from comam_nb.lm.decoding import own_draws, sample_rows
from comam_nb.lm.engines import make_engine
from comam_nb.lm.lora import add_adapters

ROWS = [(3, 4, 5), (6, 7), (8, 3, 3, 9), (6, 7)] # two are equal
MEMORY = 0.003 # of what is free here; clearing more takes longer than the texts, the library's own choice half a minute


def tokenizer():
    words = {w: i for i, w in enumerate("<pad> <eos> <unk> the cat drinks tea . yes no ?".split())}
    tok = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
                                   padding_side="left")

class Endless(Backbone):
    "Its texts have no end but the limit."
    eos_ids = property(lambda self: [])

def policy(adapters=("extraction", "profile"), kind=(LlamaConfig, LlamaForCausalLM), stop="", made=Backbone,
           **settings):
    "A tiny model whose adapters have something to say."
    torch.manual_seed(0)
    size = dict(vocab_size=11, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=256, eos_token_id=1, pad_token_id=0, bos_token_id=None,
                initializer_range=0.5)
    model = kind[1](kind[0](**size | settings)).eval()
    if adapters:
        model = add_adapters(model, adapters, r=4)
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "lora_B" in key: p.normal_(0, 0.2)
    return made(model.eval(), tokenizer(), tuple(adapters), "tiny", stop)

@pytest.fixture()
def engine():
    "engine(backbone): continuous batching, closed at the end."
    opened = []
    def attach(backbone, **kw):
        backbone.writer = make_engine("continuous", backbone, **{"memory": MEMORY} | kw)
        opened.append(backbone.writer)
        return backbone.writer
    yield attach
    for e in opened: e.close()

def ids(backbone, rows=ROWS, G=1, **kw):
    return [[s.ids for s in g] for g in sample_rows(backbone, rows, G, **dict(max_new_tokens=8) | kw)]

class Named(TorchDispatchMode):
    "The names of the operators that are called."
    def __init__(self, names): super().__init__(); self.names = names
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.names.append(f.overloadpacket.__name__)
        return f(*args, **kwargs or {})

def both(backbone, writer, *args, **kw):
    "What the engine writes, and what is written without."
    written = ids(backbone, *args, **kw)
    backbone.writer, kept = None, backbone.writer
    plain = ids(backbone, *args, **kw)
    backbone.writer = kept
    return written, plain


# ---- continuous batching

def test_greedy_ids_are_those_of_generate_under_each_adapter_in_turn(engine):
    b = policy()
    writer = engine(b)
    seen = []
    for adapter in ("extraction", "profile", "extraction"):
        written, plain = both(b, writer, adapter=adapter, temperature=0.0, G=2, shared_prefix=False)
        assert written == plain and b.model.active_adapter == adapter
        seen.append(written)
    assert seen[0] == seen[2] != seen[1]
    assert {len(t) for g in seen[0] + seen[1] for t in g} - {8} # some end by themselves
    assert len(writer.managers) == 2 # one for each adapter, kept between the calls

def test_new_weights_are_seen_though_the_manager_and_its_cache_are_kept(engine):
    "The library would find the long prompt's first 512 tokens in its cache, as they were under the old weights."
    b = policy(made=Endless, max_position_embeddings=1024)
    writer, prompts = engine(b), [*ROWS, tuple(3 + i % 7 for i in range(600))]
    ask = lambda: both(b, writer, prompts, adapter="profile", temperature=0.0)
    before, _ = ask()
    manager = [m for m, _ in writer.managers.values()]
    with torch.no_grad():
        for key, p in b.model.named_parameters():
            if "lora_B.profile" in key: p.mul_(-3)
    written, plain = ask()
    assert written == plain and all(x != y for x, y in zip(written, before))
    assert [m for m, _ in writer.managers.values()] == manager

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_draws_of_one_s_own_give_the_texts_that_the_decoding_gives(engine, temperature):
    b = policy()
    writer = engine(b)
    for step in range(2):
        draws = own_draws([(step, i) for i in range(len(ROWS))], 3, 8)
        written, plain = both(b, writer, adapter="profile", G=3, draws=draws, temperature=temperature)
        assert written == plain and len({t for g in written for t in g}) > 6
    assert len(writer.managers) == 1

def test_a_prompt_of_one_token_has_its_group_too(engine):
    b = policy(())
    writer, rows = engine(b), [(3,), (4, 5)]
    written, plain = both(b, writer, rows, G=3, draws=own_draws([(0,), (1,)], 3, 8))
    assert written == plain

def test_a_long_prompt_is_read_in_parts_before_it_forks(engine):
    b = policy((), max_position_embeddings=4096)
    writer, rows = engine(b), [tuple(3 + i % 8 for i in range(n)) for n in (1024, 1025, 1026, 2049)]
    written, plain = both(b, writer, rows, G=2, draws=own_draws([(i,) for i in range(4)], 2, 8))
    assert written == plain

def test_equal_prompts_fork_from_one_request():
    found = list(engines._requests(ROWS, 2, greedy=False))
    assert [(p, [n for ns in where for n in ns]) for _, p, where in found] == \
        [(ROWS[0], [0, 1]), (ROWS[1], [2, 3, 6, 7]), (ROWS[2], [4, 5])]
    assert [where for _, _, where in engines._requests(ROWS[:1], 2, greedy=True)] == [[[0, 1]]]

def test_texts_of_a_group_are_drawn_from_the_model_s_distribution(engine):
    b = policy((), initializer_range=0.3)
    engine(b)
    rows, G, temperature = [(3, 4, 5), (6, 7)], 2000, 0.7
    torch.manual_seed(1)
    groups = ids(b, rows, G, temperature=temperature, max_new_tokens=2)
    for row, group in zip(rows, groups):
        p = lambda *more: (b.model(torch.tensor([[*row, *more]])).logits[0, -1].double() / temperature).softmax(-1)
        with torch.no_grad(): first, second = p(), p(most := Counter(t[0] for t in group).most_common(1)[0][0])
        assert most != 1 # not the end
        follows = [t[1] for t in group if t[0] == most]
        for expected, seen in ((first, [t[0] for t in group]), (second, follows)):
            times = Counter(seen)
            chi = sum((times[k] - e) ** 2 / e for k, e in enumerate((expected * len(seen)).tolist()))
            assert chi < 35.6 # ten degrees of freedom: passed once in 10,000

@pytest.mark.slow
def test_the_same_seed_gives_the_same_texts_and_opening_leaves_torch_s_stream_alone(engine):
    b = policy()
    writer = engine(b)
    torch.manual_seed(5)
    first, after = ids(b, G=3, adapter="profile"), torch.rand(1)
    for _ in range(2):
        torch.manual_seed(5)
        assert ids(b, G=3, adapter="profile") == first and torch.equal(torch.rand(1), after)
    writer.close()
    torch.manual_seed(5)
    assert ids(b, G=3, adapter="profile") == first # the manager was made anew

def test_ends_and_stop_texts_cut_as_the_decoding_cuts(engine):
    draws = own_draws([(i,) for i in range(len(ROWS))], 8, 8)
    b = policy()
    free, plain = both(b, engine(b), G=8, adapter="profile", draws=draws)
    assert free == plain and {t[-1] == 1 for g in free for t in g} == {True, False}
    b = policy(stop="drinks tea") # a text of two tokens
    written, plain = both(b, engine(b), G=8, adapter="profile", draws=draws)
    assert written == plain != free
    assert any(t[-2:] == (5, 6) and len(t) < 8 for g in written for t in g)

def test_a_window_that_slides_and_a_nucleus_are_the_library_s(engine):
    b = policy((), (MistralConfig, MistralForCausalLM), sliding_window=4)
    rows = [(3, 4, 5, 6, 7, 8, 9, 10), (6, 7, 8, 9, 3)]
    written, plain = both(b, engine(b), rows, temperature=0.0, shared_prefix=False)
    assert written == plain
    b = policy(())
    engine(b)
    likeliest = ids(b, temperature=0.0)
    assert ids(b, G=2, top_p=1e-6) == [g * 2 for g in likeliest]

@pytest.mark.parametrize("way", [dict(temperature=0.0), dict(temperature=0.7), dict(draws=own_draws([(0,)] * 4, 1, 8))])
def test_a_step_asks_the_card_nothing_and_is_the_same_kernels_for_every_token(engine, way):
    "So that a card may record it once and play it back; sampling and draws of one's own are part of it."
    b = policy(made=Endless)
    writer, calls = engine(b), []
    ids(b, adapter="profile", **way)
    runner = next(iter(writer.managers.values()))[0].batch_processor.model_runner
    plain = runner.compute_batch
    def noted(*args):
        calls.append([])
        with Named(calls[-1]): return plain(*args)
    runner.compute_batch = noted
    ids(b, adapter="profile", **way)
    assert len(calls) >= 8 and calls[-1] == calls[-2] == calls[-3]
    assert not {"_local_scalar_dense", "nonzero", "equal", "masked_select"} & {k for c in calls for k in c}
    assert {"index_select", "scaled_dot_product_attention", "argmax", "multinomial"} & {*calls[-1]}

def test_the_model_comes_back_as_it_was(engine):
    b = policy()
    writer = engine(b)
    b.model.train()
    before = {k: (v.clone(), v.requires_grad) for k, v in b.model.named_parameters()}
    ids(b, adapter="profile")
    assert all(m.training for m in b.model.modules()) and b.model.config._attn_implementation == "sdpa"
    assert all(torch.equal(p, before[k][0]) and p.requires_grad == before[k][1] for k, p in b.model.named_parameters())
    assert not any(m.is_running() for m, _ in writer.managers.values())
    assert "_cached_continuous_batching_manager" not in b.model.get_base_model().__dict__

@pytest.mark.slow
def test_more_rows_open_a_larger_manager_and_no_more_are_kept_than_said(engine):
    b = policy()
    writer = engine(b)
    writer.keep = 2
    ids(b, ROWS[:1], adapter="profile")
    (small, size), = writer.managers.values()
    ids(b, ROWS, 3, adapter="profile")
    (large, more), = writer.managers.values()
    assert (size, more) == (1, 16) and large is not small
    for t in (0.5, 0.6, 0.7): ids(b, ROWS[:1], temperature=t, adapter="profile")
    assert [k[1] for k in writer.managers] == [0.6, 0.7]

def test_what_the_engine_cannot_do_is_said_in_a_line(monkeypatch, engine):
    b = policy()
    with pytest.raises(BackboneError, match="unknown engine 'fast'"): make_engine("fast", b)
    with pytest.raises(BackboneError, match="engine_memory"): make_engine("continuous", b, memory=0)
    engine(b, memory=1e-6)
    with pytest.raises(BackboneError, match="cannot begin .*engine_memory"): ids(b)
    assert b.model.config._attn_implementation == "sdpa"
    mixed = SimpleNamespace(model=SimpleNamespace(config=Lfm2Config(num_hidden_layers=2,
                                                                    layer_types=["conv", "full_attention"])))
    with pytest.raises(BackboneError, match="no attention"): make_engine("continuous", mixed, memory=0.1)
    monkeypatch.setattr(engines, "fields", lambda config: [SimpleNamespace(name="use_cuda_graph")])
    engine(b)
    with pytest.raises(BackboneError, match="transformers .* has no allow_block_sharing, .*5.17 to 5.23"): ids(b)

def test_an_error_inside_the_engine_reaches_the_caller(monkeypatch, engine):
    b = policy(())
    writer = engine(b)
    ids(b)
    monkeypatch.setattr(b.model, "forward", lambda **kw: 1 / 0)
    with pytest.raises(BackboneError, match="ended early .*division by zero"): ids(b)
    monkeypatch.undo()
    assert not writer.managers
    written, plain = both(b, writer, temperature=0.0)
    assert written == plain

def test_on_a_cpu_the_policy_writes_itself_unless_told_otherwise():
    assert make_engine("auto", policy(())) is None is make_engine("own", policy(()))

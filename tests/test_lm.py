"Adapters and their files, the judge's mode, templates, the kernels' switch, and stop texts."
import builtins
import json
from dataclasses import replace
from pathlib import Path

import pytest, torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import comam_nb
from comam_nb.base.embedders import HFEmbedder
from comam_nb.base.errors import BackboneError, StoreError
from comam_nb.lm.backbone import Backbone, load_backbone, prompt_ids, template_length
from comam_nb.lm.cpu_kernels import use_kernels
from comam_nb.lm.decoding import sample_each, sample_group, sample_rows
from comam_nb.lm.lora import add_adapters, load_adapter, save_adapter, use_adapter
from comam_nb.lm.scoring import choice_probs, shared_logprobs, token_logprobs

WEIGHTS = Path(comam_nb.__file__).parent / "weights"
IDS = torch.tensor([[3, 4, 5, 6, 7]])

def tiny(seed=0, **settings):
    torch.manual_seed(seed)
    size = dict(vocab_size=11, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, max_position_embeddings=256, eos_token_id=1, pad_token_id=0, bos_token_id=None,
                initializer_range=0.5)
    return LlamaForCausalLM(LlamaConfig(**size | settings)).eval()

def tokenizer():
    words = {w: i for i, w in enumerate("<pad> <eos> <unk> the cat drinks tea . yes no ?".split())}
    tok = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tok, padding_side="left", **special)

def trained(model, names=("profile",), seed=1, **settings):
    "Adapters with something to say."
    model = add_adapters(model, names, **settings)
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_B" in key: p.normal_(0, 0.1)
    return model

@pytest.fixture()
def folder(tmp_path):
    "An adapter of rank 8 with alpha 32, written by PEFT itself."
    trained(tiny(), r=8, alpha=32).save_pretrained(str(tmp_path))
    return tmp_path / "profile"

def reference(folder, model=None):
    from peft import PeftModel
    return PeftModel.from_pretrained(model or tiny(), str(folder)).eval()(IDS).logits


# ---- adapters ----
@pytest.mark.parametrize("before", [None, ("extraction",), ("profile",), ("extraction", "profile")])
def test_an_adapter_with_alpha_32_says_what_it_says_in_peft(folder, before):
    model = tiny() if before is None else trained(tiny(), before, seed=5, r=4)
    model = load_adapter(model, "profile", folder)
    use_adapter(model, "profile")
    assert torch.equal(model(IDS).logits, reference(folder))
    assert (model.peft_config["profile"].r, model.peft_config["profile"].lora_alpha) == (8, 32)

def test_a_saved_adapter_is_peft_s_and_comes_back(tmp_path):
    model = trained(tiny(), ("a", "b"), r=8, alpha=32, target_modules=["q_proj", "v_proj"])
    model.save_pretrained(str(tmp_path / "peft"), selected_adapters=["b"])
    save_adapter(model, "b", tmp_path / "own")
    assert sorted(p.name for p in (tmp_path / "own").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    one, other = (json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("peft/b", "own"))
    for d in (one, other): d["target_modules"] = sorted(d["target_modules"])
    assert one == other
    one, other = (load_file(str(tmp_path / f / "adapter_model.safetensors")) for f in ("peft/b", "own"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert torch.equal(load_adapter(tiny(), "x", tmp_path / "own")(IDS).logits, reference(tmp_path / "peft/b"))

def test_loading_leaves_everything_else_as_it_was(folder):
    model = trained(tiny(), ("a", "b"), r=4)
    model.train()
    for k, p in model.named_parameters():
        if ".b." in k: p.requires_grad_(False) # a frozen agent
    use_adapter(model, "b")
    state = {k: (p.clone(), p.requires_grad) for k, p in model.named_parameters()}
    for trainable in (False, True):
        load_adapter(model, "profile", folder, trainable)
        now = dict(model.named_parameters())
        assert model.training and model.active_adapter == "b"
        assert all(torch.equal(now[k], p) and now[k].requires_grad == t for k, (p, t) in state.items())
        assert {p.requires_grad for k, p in now.items() if ".profile." in k} == {trainable}

def test_the_same_settings_go_into_the_same_tensors(folder):
    "An optimizer holds on to them."
    model = load_adapter(trained(tiny(), seed=9, r=8, alpha=32), "profile", folder, trainable=True)
    tensors = [p for k, p in model.named_parameters() if ".profile." in k]
    save_adapter(trained(tiny(), seed=4, r=8, alpha=32), "profile", folder)
    load_adapter(model, "profile", folder, trainable=True)
    assert all(p is q for p, q in zip(tensors, (p for k, p in model.named_parameters() if ".profile." in k)))
    assert torch.equal(model(IDS).logits, reference(folder))

def damaged(folder, how):
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if how == "no config": config.unlink()
    if how == "no weights": weights.unlink()
    if how == "torn config": config.write_text(config.read_text()[:50])
    if how == "not an adapter": config.write_text("{}")
    if how == "torn weights": weights.write_bytes(weights.read_bytes()[:100])
    if how == "wider": save_adapter(trained(tiny(hidden_size=64), r=8), "profile", folder)
    if how == "more layers": save_adapter(trained(tiny(num_hidden_layers=3), r=8), "profile", folder)
    if how == "half": save_file({k: v for k, v in load_file(weights).items() if "layers.0" in k}, weights)
    if how == "absent": return folder / "absent"
    return folder

DAMAGES = ["no config", "no weights", "torn config", "not an adapter", "torn weights", "wider", "more layers", "half",
           "absent"]

@pytest.mark.parametrize("how", DAMAGES)
def test_what_does_not_fit_is_refused_and_nothing_has_changed(folder, how):
    model = trained(tiny(), seed=3, r=4)
    before = model(IDS).logits
    bad = damaged(folder, how)
    with pytest.raises(BackboneError, match="no such file|cannot be read|another model"):
        load_adapter(model, "profile", bad)
    assert torch.equal(model(IDS).logits, before)
    with pytest.raises(BackboneError): load_adapter(tiny(), "profile", bad)

@pytest.mark.parametrize("run", ["microworld_trained", "memory_r1/trained", "memory_r1/warm"])
def test_shipped_adapters_load(run):
    plain = load_backbone(WEIGHTS / "microworld", adapters=None, device="cpu", verbose=False).model
    for f in sorted((WEIGHTS / run).iterdir()):
        again = load_backbone(WEIGHTS / "microworld", adapters=None, device="cpu", verbose=False).model
        plain = load_adapter(plain, f.name, f)
        use_adapter(plain, f.name)
        assert torch.equal(plain(IDS).logits, reference(f, again))
        with plain.disable_adapter(): assert not torch.equal(plain(IDS).logits, reference(f, again))


def test_switching_to_a_frozen_adapter_does_not_make_it_trainable():
    model = trained(tiny(), ("a", "b"), r=4)
    for k, p in model.named_parameters(): p.requires_grad_(".b." in k)
    for name in "ab":
        use_adapter(model, name)
        assert {k.split(".")[-2] for k, p in model.named_parameters() if p.requires_grad} == {"b"}


# ---- the judge ----
def test_the_judge_says_the_same_in_training_mode():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=11, n_embd=32, n_layer=2, n_head=2, n_positions=64) # its dropout is 0.1
    model = GPT2LMHeadModel(config)
    judge = Backbone(model, tokenizer())
    asked = lambda: choice_probs(judge, ["the cat drinks tea ?"], ("yes", "no"))
    expected = (model.eval(), asked())[1]
    model.train()
    frozen = model.transformer.drop.eval()
    assert all(torch.equal(asked(), expected) for _ in range(3))
    assert model.training and model.transformer.h[0].training and not frozen.training


def test_questions_that_begin_alike_are_read_once_and_answered_as_alone():
    policy, passes = Backbone(trained(tiny(), r=4), tokenizer()), []
    policy.model.get_base_model().register_forward_hook(lambda *a: passes.append(1))
    talks = ["the cat drinks tea . " * n for n in (3, 11, 30)]
    asked = [f"{t} {p} {q} ?" for t in talks for p in ("tea", "the cat", "no") for q in ("yes", "tea .", "drinks the")]
    with use_kernels(False): alone = torch.cat([choice_probs(policy, [q], ("yes", "no")) for q in asked])
    assert len(passes) == len(asked) == 27
    for on in (True, False):
        passes.clear()
        with use_kernels(on): together = choice_probs(policy, asked, ("yes", "no"))
        assert torch.allclose(together, alone, atol=1e-5) and len(passes) <= 3
    passes.clear()
    assert torch.allclose(choice_probs(policy, asked, ("yes", "no"), batch_size=9), alone, atol=1e-5)
    assert 3 <= len(passes) <= 9 and alone.std(0).min() > 1e-3 # one conversation after the other; answers do differ


# ---- the template ----
def test_the_template_is_measured_and_takes_arguments(tmp_path):
    tiny().save_pretrained(tmp_path)
    tok = tokenizer()
    tok.chat_template = "yes {{ messages[0]['content'] }} .{% if not enable_thinking|default(true) %} no ?{% endif %}"
    tok.save_pretrained(tmp_path)
    load = lambda **kw: load_backbone(tmp_path, adapters=None, device="cpu", verbose=False, **kw)
    thinking, quiet, none = load(), load(template_args={"enable_thinking": False}), load(chat=False)
    assert [prompt_ids(b, "the cat") for b in (thinking, quiet, none)] == [[8, 3, 4, 7], [8, 3, 4, 7, 9, 10], [3, 4]]
    assert [template_length(b) for b in (thinking, quiet, none)] == [2, 4, 0]
    quiet.template_args = {} # measured anew
    assert template_length(quiet) == 2


# ---- code that a model brings along ----
@pytest.mark.parametrize("which", ["model", "encoder"])
def test_code_that_a_model_brings_is_never_run_whatever_a_terminal_says(tmp_path, monkeypatch, which):
    ran = tmp_path / "ran"
    for n in ("configuration_x", "modeling_x", "tokenization_x"):
        (tmp_path / f"{n}.py").write_text(f"open({str(ran)!r}, 'w')\nclass X: pass\n")
    places = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X", "AutoModel": "modeling_x.X"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x_of_its_own", "auto_map": places}))
    reader = {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(reader))
    monkeypatch.setattr(builtins, "input", lambda *a: "y") # what transformers asks at a terminal
    with pytest.raises((BackboneError, StoreError), match="custom code"):
        load_backbone(tmp_path) if which == "model" else HFEmbedder(str(tmp_path))
    assert not ran.exists()


# ---- the kernels' switch ----
def test_greedy_texts_are_those_of_the_plain_path():
    policy, args = Backbone(trained(tiny(), r=4), tokenizer()), dict(temperature=0, max_new_tokens=20)
    prompts = ["the cat drinks tea . " * n + "yes no ?" for n in (3, 12, 20)]
    def texts(on):
        with use_kernels(on):
            return [sample_group(policy, prompts, G=1, shared_prefix=s, **args) for s in (True, False)] + [
                sample_each(policy, prompts, None, 20, 4, long=0)]
    shared, simple, each = texts(True)
    assert shared == simple == each and [shared] * 3 == texts(False)

def test_log_probabilities_and_gradients_are_those_of_the_plain_path():
    model = trained(tiny(vocab_size=5000), r=4) # a large vocabulary: rows at a time
    policy, weights = Backbone(model, tokenizer()), [p for p in model.parameters() if p.requires_grad]
    prompts, completions = [[3 + i % 8 for i in range(70)]] * 4, [[5, 6, 7, 1], [8], [9, 10], [5, 6]]
    naive, mask = token_logprobs(policy, prompts, completions)
    for on in (True, False):
        with use_kernels(on): logps, _ = shared_logprobs(model, prompts, completions, long=2)
        assert torch.allclose(logps, naive, atol=1e-5)
        for a, b in zip(*(torch.autograd.grad((x * mask).sum(), weights, retain_graph=True) for x in (logps, naive))):
            assert (a - b).abs().max() <= 1e-4 * b.abs().max().clamp(min=1e-3)

def test_rows_of_ids_are_sampled_as_texts_are():
    policy, prompts = Backbone(tiny(), tokenizer()), ["the cat drinks", "tea ?", "yes . no . the tea"]
    rows = [prompt_ids(policy, p) for p in prompts]
    for settings in ({}, {"temperature": 0}, {"top_p": 0.8}):
        torch.manual_seed(0)
        texts = sample_group(policy, prompts, G=3, max_new_tokens=9, **settings)
        torch.manual_seed(0)
        assert sample_rows(policy, rows, G=3, max_new_tokens=9, **settings) == texts
    with pytest.raises(BackboneError, match="300 tokens and the completion needs 9"):
        sample_rows(policy, [[3] * 300], max_new_tokens=9)


# ---- stop texts ----
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_stop_text_ends_the_shared_way_where_it_ends_the_simple_one(temperature):
    policy = Backbone(tiny(seed=3), tokenizer())
    for prompts in (["the cat drinks", "tea ?"], ["the cat drinks tea . " * 8 + "yes"]):
        def texts(shared, stop=""):
            torch.manual_seed(1)
            return sample_group(replace(policy, stop=stop), prompts, 6, None, temperature, max_new_tokens=25,
                                shared_prefix=shared)
        free = max((s.text for g in texts(True) for s in g), key=len)
        words, n = free.split(), len(free)
        for stop in {words[3], " ".join(words[4:6]), free[n // 3:n // 3 + 4], free[n // 2:n // 2 + 9], free[-1], " "}:
            ended = texts(True, stop)
            assert ended == texts(False, stop) and any(stop in s.text for g in ended for s in g)
        assert texts(True, "never") == texts(False)
    prompts = ["the cat drinks tea . " * n for n in (3, 9, 5)]
    for policy.stop in words[:4]:
        assert sample_each(policy, prompts, None, 25, 2, long=0) == sample_group(
            policy, prompts, temperature=0, max_new_tokens=25, shared_prefix=False)

def test_looking_for_a_stop_text_reads_each_token_a_few_times_only():
    read, tok = [], tokenizer()
    class Counting:
        pad_token_id, eos_token_id, chat_template = 0, None, None
        def __call__(self, text, **kw): return tok(text, **kw)
        def decode(self, ids, **kw):
            read.append(len(ids))
            return tok.decode(ids, **kw)
    policy = Backbone(tiny(), Counting(), stop="never") # no token of its vocabulary can end this
    policy.model.generation_config.eos_token_id = None
    [group] = sample_group(policy, ["the cat drinks"], G=4, max_new_tokens=200)
    assert [len(s.ids) for s in group] == [200] * 4
    assert sum(read) <= 5 * 4 * 200 # each from its beginning at every token: 4 x 200 x 100

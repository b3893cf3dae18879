"Attention in parts, and layers that are packed together: where they are used, where not, and what they leave behind."
import sys
from functools import partial
from types import SimpleNamespace

import pytest, torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from comam_nb.lm import cpu_kernels as kernels
from comam_nb.lm.cpu_kernels import attention_in_parts, fast_writing, use_kernels
from comam_nb.base.errors import BackboneError
from comam_nb.lm.backbone import Backbone
from comam_nb.lm.lora import add_adapters
from comam_nb.lm.scoring import shared_logprobs, token_logprobs

SIZE = dict(vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            head_dim=16,
            num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, eos_token_id=1, bos_token_id=None,
            initializer_range=0.2)
PROMPTS = [[3 + i % 30 for i in range(600)]] * 3 + [[4 + i % 25 for i in range(560)]] * 3 # of unlike length: padding
COMPLETIONS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [15, 16], [17]]

def make(family="llama", **kw):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZE, **kw})).eval()

def near(a, b): return (a - b).abs().max() <= 1e-4 * b.abs().max().clamp(min=1e-3)

def score(model, monkeypatch=None, prompts=PROMPTS, completions=COMPLETIONS, **kw):
    "Log-probs, gradients of all weights, and how many layers' attention was computed in parts."
    used, apply = [], kernels._SegmentAttention.apply
    if monkeypatch: monkeypatch.setattr(kernels._SegmentAttention, "apply", lambda *a: used.append(1) or apply(*a))
    logps, _ = shared_logprobs(model, prompts, completions, **kw)
    weights = [p for p in model.parameters() if p.requires_grad]
    direction = torch.linspace(-1, 1, logps.numel()).view(logps.shape)
    return logps, torch.autograd.grad((logps * direction).sum(), weights, allow_unused=True), len(used)

@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma", "gpt_neox"])
def test_completions_behind_long_prompts_are_scored_in_parts_and_equal(family, monkeypatch):
    model = make(family)
    logps, gradients, used = score(model, monkeypatch)
    simple, expected, none = score(model, monkeypatch, long=10_000) # no pass for the prompts: one row with a mask
    assert (used, none) == (2, 0) # layers
    assert torch.allclose(logps, simple, atol=1e-4)
    for a, b in zip(gradients, expected): assert a is b is None or near(a, b)
    assert model.config._attn_implementation == "sdpa"

def test_long_completions_go_in_several_rows_in_parts_and_equal(monkeypatch):
    texts = dict(prompts=[PROMPTS[0][:20]] * 6, completions=[c * 30 for c in COMPLETIONS]) # 390 tokens behind 20
    model = make()
    logps, gradients, used = score(model, monkeypatch, many=100, **texts)
    simple, expected, none = score(model, monkeypatch, **texts)
    assert (used, none) == (2, 0) and torch.allclose(logps, simple, atol=1e-4)
    assert all(near(a, b) for a, b in zip(gradients, expected))

def test_in_bfloat16_parts_are_as_near_to_the_truth_as_a_mask_is(monkeypatch):
    before = getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None)
    model = make()
    _, truth, _ = score(model)
    model.bfloat16()
    (_, parts, used), (_, mask, none) = score(model, monkeypatch), score(model, monkeypatch, long=10_000)
    norm = lambda xs: sum(x.norm() ** 2 for x in xs) ** 0.5
    away = lambda grads: norm([a.float() - b for a, b in zip(grads, truth)]) / norm(truth)
    assert (used, none) == (2, 0) and away(parts) < 1.25 * away(mask) < 0.2
    assert getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", None) == before

WINDOW = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])

@pytest.mark.parametrize("family", ["gemma3_text", "gemma2", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("lengths", [(3, 4, 2), (30, 30, 30), (6, 40, 13)]) # under the window, over it, both
def test_layers_with_a_window_see_what_they_see_without_sharing(family, lengths):
    more = WINDOW | dict(use_sliding_window=True) if "qwen" in family else WINDOW
    model = make(family, **more if family != "mistral" else dict(sliding_window=8))
    prompts = [[3 + (i * k) % 30 for i in range(n)] for k, n in enumerate(lengths, 1) for _ in range(2)]
    completions = [[5, 6], [8], [9, 10, 11], [12], [15, 16], [17] * (4 if max(lengths) < 8 else 20)]
    naive, mask = token_logprobs(Backbone(model, SimpleNamespace(pad_token_id=0)), prompts, completions)
    logps, gradients, _ = score(model, prompts=prompts, completions=completions)
    assert (logps - naive).abs().max() <= 1e-5 * naive.abs().max()
    direction = torch.linspace(-1, 1, logps.numel()).view(logps.shape)
    weights = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad((naive * direction).sum(), weights, allow_unused=True)
    for a, b in zip(gradients, expected): assert a is b is None or near(a, b)

def test_a_window_that_is_not_known_is_refused_beyond_it_and_shared_below_it():
    model = make("phi3", sliding_window=8)
    short, _ = shared_logprobs(model, [[3, 4], [3, 4]], [[5, 6], [7]])
    assert torch.allclose(short, token_logprobs(Backbone(model, SimpleNamespace(pad_token_id=0)), [[3, 4], [3, 4]],
                                                [[5, 6], [7]])[0], atol=1e-5)
    with pytest.raises(BackboneError, match="phi3 model cannot share a prompt .* 9 tokens.*use token_logprobs"):
        shared_logprobs(model, [[3, 4, 5, 6, 7, 8]] * 2, [[5, 6, 7], [7]])

@pytest.mark.parametrize("why", ["eager", "dropout", "checkpointing"])
def test_where_parts_are_not_possible_the_mask_stays(why, monkeypatch):
    settings = {"eager": dict(attn_implementation="eager"), "dropout": dict(attention_dropout=0.5), "checkpointing": {}}
    model = make(**settings[why])
    if why != "eager": model.train()
    if why == "checkpointing": model.gradient_checkpointing_enable()
    assert score(model, monkeypatch)[2] == 0

def test_a_failure_leaves_the_model_as_it_was():
    model = make()
    own, real = torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(KeyError), attention_in_parts(model, 4, own, real):
        assert model.config._attn_implementation == "in_parts"
        raise KeyError
    assert model.config._attn_implementation == "sdpa"

def changed(model): return [m.forward for m in model.modules() if "forward" in m.__dict__]

# qwen2 has biases in query, key and value; gpt_neox has one layer for the three
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("adapted", ["all-linear", "q_proj", None])
def test_layers_that_read_the_same_rows_are_packed_as_one_and_equal(family, adapted):
    if family == "gpt_neox" and adapted == "q_proj": adapted = "dense"
    model = make(family)
    if family == "qwen2":
        with torch.no_grad():
            for n, p in model.named_parameters():
                if n.endswith("bias"): p.normal_()
    if adapted:
        model = add_adapters(model, ("profile",), r=4, target_modules=adapted if adapted == "all-linear" else [adapted])
        with torch.no_grad():
            for n, p in model.named_parameters():
                if ".lora_B" in n: p.normal_(0, 0.1)
    model = model.bfloat16()
    ids = torch.tensor([[3, 4, 5, 6, 7], [9, 8, 7, 6, 5]])
    with torch.no_grad():
        simple = model(ids).logits
        with kernels._packed_weights(model): packed, forwards = model(ids).logits, changed(model)
        assert torch.equal(model(ids).logits, simple) and not changed(model)
    assert (packed - simple).abs().max() <= 2**-5 * simple.abs().max()
    if forwards: # a processor whose library can
        assert any(f.func is kernels._packed_part for f in forwards) == (family != "gpt_neox")

def test_adapted_linear_has_the_gradients_of_its_formula():
    torch.manual_seed(0)
    x, W, b, A, B = (torch.randn(*s, dtype=torch.float64) for s in ((5, 6), (4, 6), (4,), (2, 6), (4, 2)))
    for t in (x, A, B): t.requires_grad_()
    assert torch.autograd.gradcheck(kernels._AdaptedLinear.apply, (x, W, b, A, B))

def adapted(family, r=4, **kw):
    model = add_adapters(make(family, **kw), ("profile", "other"), r=r)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".lora_B" in n: p.normal_(0, 0.1)
            if n.endswith("norm.weight") or n.endswith("bias"): p.normal_(1, 0.3)
    return model

# qwen2 has biases, qwen3 norms of queries and keys; gemma other norms, gpt_neox one layer for query, key and value
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gpt_neox"])
def test_what_a_card_computes_in_few_launches_is_the_same(family):
    model = adapted(family)
    texts = dict(prompts=[p[:20] for p in PROMPTS])
    naive, mask = token_logprobs(Backbone(model, SimpleNamespace(pad_token_id=0)), texts["prompts"], COMPLETIONS)
    direction = torch.linspace(-1, 1, naive.numel()).view(naive.shape)
    weights = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad((naive * direction).sum(), weights, allow_unused=True)
    launches = []
    for cpu in (True, False):
        with use_kernels(cpu=cpu), kernels.direct_adapter(model), Count() as few:
            logps, gradients, _ = score(model, **texts)
        launches.append(few.n)
        assert (logps - naive).abs().max() <= 1e-5 * naive.abs().max()
        for a, b in zip(gradients, expected): assert a is b is None or near(a, b)
    assert sum(g is not None and bool(g.any()) for g in expected) == len(weights) // 2 # the other adapter rests
    if family in kernels._FEW: assert launches[1] < 0.85 * launches[0] # of two layers, and what comes before and after
    assert not changed(model)

class Count(TorchDispatchMode):
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += not func.is_view
        return func(*args, **kwargs or {})

def test_in_bfloat16_few_launches_are_as_near_to_the_truth_as_pefts_many():
    model, texts = adapted("llama", r=8), dict(prompts=[p[:20] for p in PROMPTS])
    _, truth, _ = score(model, **texts)
    for p in model.parameters():
        if not p.requires_grad: p.data = p.data.bfloat16()
    norm = lambda xs: sum(x.norm() ** 2 for x in xs if x is not None) ** 0.5
    away = lambda grads: norm([a.float() - b for a, b in zip(grads, truth) if b is not None]) / norm(truth)
    with torch.autocast("cpu", torch.bfloat16):
        with use_kernels(False): many = score(model, **texts)[1]
        with use_kernels(cpu=False), kernels.direct_adapter(model): few = score(model, **texts)[1]
    assert away(few) < 1.25 * away(many) < 0.2

def test_a_family_gets_its_rotation_back_even_after_a_failure():
    model = adapted("llama")
    code = sys.modules[type(model.get_base_model()).__module__]
    before = code.apply_rotary_pos_emb
    with pytest.raises(KeyError), use_kernels(cpu=False), kernels.direct_adapter(model):
        assert code.apply_rotary_pos_emb is kernels._rotary and changed(model)
        raise KeyError
    assert code.apply_rotary_pos_emb is before and not changed(model)

def test_adapters_of_unlike_ranks_are_computed_apart_and_equal():
    from peft import LoraConfig, get_peft_model
    config = LoraConfig(r=4, rank_pattern={"k_proj": 2, "down_proj": 3}, target_modules="all-linear", lora_alpha=6,
                        init_lora_weights=False)
    model = get_peft_model(make(), config)
    expected, grads, _ = score(model, prompts=[[3, 4, 5]] * 6)
    with use_kernels(cpu=False), kernels.direct_adapter(model): logps, own, _ = score(model, prompts=[[3, 4, 5]] * 6)
    assert torch.allclose(logps, expected, atol=1e-4) and all(near(a, b) for a, b in zip(own, grads))

def test_writing_undoes_what_it_changed_even_after_a_failure():
    model = add_adapters(make(), ("profile",), r=4).bfloat16()
    plain = model.forward
    dressed = lambda *a, **k: plain(*a, **k)
    model._original_forward, model.forward = plain, dressed # as Accelerate does
    with pytest.raises(KeyError), fast_writing(model, 64):
        assert model.forward == plain and torch.is_inference_mode_enabled()
        raise KeyError
    assert model.__dict__["forward"] is dressed and not torch.is_inference_mode_enabled()
    assert changed(model) == [dressed]

def test_the_switch_turns_every_kernel_off(monkeypatch):
    monkeypatch.setattr(kernels.sys, "platform", "linux")
    monkeypatch.setattr(kernels.ctypes, "CDLL", lambda name: pytest.fail("glibc was asked"))
    model = add_adapters(make(), ("profile",), r=4).bfloat16()
    z = torch.randn(3, 4096, requires_grad=True)
    with use_kernels(False):
        kernels.keep_freed_memory()
        for way in (kernels.merged_adapter, kernels.direct_adapter, kernels._packed_weights,
                    partial(fast_writing, tokens=64)):
            with way(model): assert not changed(model) and not torch.is_inference_mode_enabled()
        logps, _ = kernels.selective_log_softmax(z, torch.tensor([0]), torch.tensor([5]))
        assert "SelectiveLogSoftmax" not in type(logps.grad_fn).__name__
        assert score(make(), monkeypatch)[2] == 0
    assert score(make(), monkeypatch)[2] == 2

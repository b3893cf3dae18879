"Teams of any mix: who is trained, who judges, what is kept and what comes back."
from dataclasses import replace
from pathlib import Path

import pytest, torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast,
                          TrainerCallback)

import comam_nb
from comam_nb.agents import ExtractionAgent, ProfileAgent, RetrievalAgent
from comam_nb.base.errors import BackboneError, CreditError
from comam_nb.data import example_episode
from comam_nb.lm.backbone import Backbone
from comam_nb.lm.lora import add_adapters, use_adapter
from comam_nb.mdp import AGENTS, Scripted
from comam_nb.rewards import RubricJudge, lm_yes
from comam_nb.rl.settings import CoMAMConfig
from comam_nb.rl.team import FrozenModel, Team, make_team
from comam_nb.training import CoMAMTrainer

KINDS = {"extraction": ExtractionAgent, "profile": ProfileAgent, "retrieval": RetrievalAgent}
IDS = torch.tensor([[3, 4, 5, 6]])

def words(n, first="w"):
    "A tokenizer of n words of its own."
    vocabulary = ["<pad>", "<eos>", "<unk>", *(f"{first}{i}" for i in range(n - 5)), "Yes", "No"]
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
                                   padding_side="left")

def llama(seed=0, width=16, n=30, tied=False):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=n, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                         num_attention_heads=2,
                         max_position_embeddings=1024, eos_token_id=1, pad_token_id=0, bos_token_id=None,
                         initializer_range=0.3,
                         tie_word_embeddings=tied)
    return Backbone(LlamaForCausalLM(config).eval(), words(n), (), f"llama {width}")

def gpt2(seed=0, n=20, dropout=0.0):
    "Another family with a smaller vocabulary, and another token for padding: its last."
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=n, n_embd=16, n_layer=2, n_head=2, n_positions=1024, eos_token_id=1, pad_token_id=0,
                        bos_token_id=None,
                        initializer_range=0.3, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
    return Backbone(GPT2LMHeadModel(config).eval(), words(n, "g"), (), "gpt2")

def adapted(backbone, name, seed=0, **kw):
    "The backbone with one adapter."
    torch.manual_seed(seed)
    return replace(backbone, model=add_adapters(backbone.model, (name,), r=2, **kw), adapters=(name,))

def papers_own(seed=0):
    torch.manual_seed(seed)
    small = llama()
    return make_team({"extraction": small, "profile": small, "retrieval": llama(width=32)}, r=2)

def three_lora_models(seed=0):
    return make_team({n: adapted(llama(i), n, seed + i) for i, n in enumerate(AGENTS)}, "separate")

def same_adapter_name(seed=0):
    return make_team({n: adapted(llama(i), "default", seed + i) for i, n in enumerate(AGENTS)}, "separate")

def three_families(seed=0):
    return make_team({"extraction": llama(seed + 1, tied=True), "profile": gpt2(seed), "retrieval": llama(seed + 2,
        32)}, "separate")

def all_kinds(seed=0):
    "An adapter, a whole model, and an endpoint that only acts."
    return Team({"extraction": ExtractionAgent(adapted(gpt2(), "mine", seed), "mine"),
                 "profile": ProfileAgent(llama(seed + 1)),
                 "retrieval": RetrievalAgent(Scripted(["<information> [1] </information> <final_answer> tea "
                                                       "</final_answer>", "no"]))})

def one_frozen(seed=0):
    "Two models of one family; the profile agent's whole model is frozen, and the others' adapters share a base."
    torch.manual_seed(seed)
    base = llama()
    team = make_team({"extraction": base, "profile": gpt2(), "retrieval": base}, r=2)
    return Team({**team, "profile": ProfileAgent(gpt2(3))}, trained=("extraction", "retrieval"))

def one_policy(seed=0):
    torch.manual_seed(seed)
    return make_team(llama(), "shared", r=2)

def adapters(seed=0):
    torch.manual_seed(seed)
    return make_team(llama(), r=2)

MIXES = [adapters, one_policy, papers_own, three_lora_models, same_adapter_name, three_families, all_kinds, one_frozen]

def short(team):
    for a in team.values(): a.max_new_tokens = 5
    for n, a in team.items():
        a.prompt = lambda state, w="g" if a.policy and "gpt2" in getattr(a.policy, "name",
            "") else "w": " ".join(f"{w}{i}" for i in range(6))
    return team

def rewards(groups):
    local = [[[len(set(t[a].text.split())) / 5 for t in g] for a in AGENTS] for g in groups]
    return torch.tensor(local), torch.tensor([[float(len(t["extraction"].action_ids) > 3) for t in g] for g in groups])

class Lines(TrainerCallback):
    def __init__(self): self.lines = []
    def on_log(self, args, state, control, logs=None, **kw):
        if "r_ret" in logs: self.lines.append(logs)

def train(folder, team, steps=2, resume=None, seed=0, **kw):
    torch.manual_seed(seed)
    args = CoMAMConfig(str(folder), **dict(max_steps=steps, episodes_per_step=1, num_generations=4, learning_rate=1e-2,
                                           use_cpu=True,
                                           disable_tqdm=True, max_completion_length=5) | kw)
    trainer = CoMAMTrainer(short(team), [example_episode()] * 3, rewards, args, callbacks=[log := Lines()])
    trainer.train(resume_from_checkpoint=resume)
    return log.lines

def weights(team):
    return {n: p.detach().clone() for ns, ps in team.groups().items() for n, p in enumerate_names(ns, ps)}
def enumerate_names(ns, ps): return [((ns, i), p) for i, p in enumerate(ps)]

def scores(team):
    "What each agent with a model thinks of the same four tokens."
    out = {}
    for n, a in team.items():
        if not isinstance(a.policy, Backbone): continue
        use_adapter(a.policy.model, a.adapter)
        out[n] = a.policy.model.eval()(IDS).logits.detach().clone()
    return out

EVERY_DAY = {"all_kinds"}
@pytest.mark.parametrize("mix", [pytest.param(m, marks=[] if m.__name__ in EVERY_DAY else pytest.mark.slow)
                                 for m in MIXES])
def test_any_mix_trains_saves_loads_and_resumes(tmp_path, mix):
    """CoMAM Alg. 1, with every kind of team. Four steps are two and two more; what is saved comes back into a fresh
    team; who is not trained stays as it was."""
    whole, halves = mix(), mix()
    before = weights(whole), scores(whole)
    train(tmp_path / "a", whole, 4)
    for k, v in weights(whole).items(): assert not torch.equal(v, before[0][k]), k
    for n in set(before[1]) - set(whole.trained): assert torch.equal(scores(whole)[n], before[1][n]), n
    train(tmp_path / "b", halves, 4, save_strategy="steps", save_steps=2)
    resumed = mix()
    train(tmp_path / "b", resumed, 4, str(tmp_path / "b" / "checkpoint-2"))
    for k, v in weights(whole).items(): assert torch.allclose(v, weights(resumed)[k], atol=1e-6), k
    whole.save(tmp_path / "weights")
    fresh = mix(seed=5)
    fresh.load(tmp_path / "weights")
    for n, x in scores(whole).items():
        if n in whole.trained: assert torch.equal(x, scores(fresh)[n]), n
    # still to be trained
    assert [len(ps) for ps in fresh.groups().values()] == [len(ps) for ps in whole.groups().values()]
    assert not list(Path(tmp_path / "weights").rglob("*.bin")) + list(Path(tmp_path / "weights").rglob("*.pt"))

def test_the_papers_own_team_is_one_line():
    small, large = llama(), llama(width=32)
    team = make_team({"extraction": small, "profile": small, "retrieval": large})
    assert team["extraction"].policy.model is team["profile"].policy.model is not team["retrieval"].policy.model
    assert [a.adapter for a in team.values()] == list(AGENTS) == list(team.trained)

@pytest.mark.parametrize("mix", [adapters, one_policy, three_families, *(pytest.param(m, marks=pytest.mark.slow)
                                                                         for m in (papers_own, three_lora_models))])
def test_each_agent_has_its_own_reference(tmp_path, mix):
    "CoMAM Eq. 7-8: with beta > 0 the divergence is 0 before any update, and grows."
    lines = train(tmp_path, mix(), 2, beta=0.1, learning_rate=3e-2)
    assert abs(lines[0]["kl"]) < 1e-7 < lines[-1]["kl"]

def test_a_kl_term_holds_an_agent_back(tmp_path):
    far, near = papers_own(), papers_own()
    start = weights(far)
    train(tmp_path, far, 3, learning_rate=3e-2)
    train(tmp_path, near, 3, learning_rate=3e-2, beta=50.0)
    moved = lambda team: sum((v - start[k]).norm() for k, v in weights(team).items())
    assert moved(near) < moved(far)


# ---- the judge

@pytest.mark.parametrize("mix", [three_families, adapters, one_policy, papers_own])
def test_the_judge_is_nobodys_policy(tmp_path, mix):
    "With separate policies it was the profile agent's own model, and was trained by its own verdicts."
    team, question = mix(), ["w1 w2 g1 w3"]
    verdict = team.judge.choice_probs(question)
    policy = FrozenModel(team["profile"].policy)
    train(tmp_path, team, 2, learning_rate=0.1)
    assert torch.equal(team.judge.choice_probs(question), verdict)
    if mix is three_families: assert not torch.equal(policy.choice_probs(question), verdict) # it has moved

def test_the_judge_is_asked_without_dropout():
    team = make_team({n: gpt2(i, dropout=0.1) for i, n in enumerate(AGENTS)}, "separate")
    model = team["profile"].policy.model.train()
    judge = RubricJudge(lm_yes(team.judge))
    notes, history = [type("Note", (), {"text": "g1 g2"})()], example_episode().history
    assert len({judge(notes, history) for _ in range(3)}) == 1
    assert model.training and all(m.training for m in model.modules()) # as it was

def test_the_judge_can_be_another_model_or_an_endpoint(tmp_path):
    other = gpt2(7)
    assert make_team(llama(), judge=other).judge.backbone is other
    class Endpoint:
        asked = 0
        def choice_probs(self, prompts, choices):
            Endpoint.asked += len(prompts)
            return [[0.75, 0.25] for _ in prompts]
    team = make_team(llama(), judge=Endpoint())
    score = RubricJudge(lm_yes(team.judge))([type("Note", (), {"text": "w1"})()], example_episode().history)
    assert score == 0.75 and Endpoint.asked == 3
    whole = {n: llama(i) for i, n in enumerate(AGENTS)}
    separate = make_team(whole, "separate", judge=whole["profile"]) # its own policy, by name
    train(tmp_path, separate, 1)
    assert separate.judge.backbone.model is not whole["profile"].model

def test_a_judge_that_nobody_trains_costs_no_copy():
    team = adapters()
    team.module()
    assert team.judge.backbone.model is team["profile"].policy.model
    whole = three_families()
    assert whole.judge.backbone.model is whole["profile"].policy.model # until weights are about to move
    whole.module(["extraction"])
    assert whole.judge.backbone.model is whole["profile"].policy.model
    whole.module()
    assert whole.judge.backbone.model is not whole["profile"].policy.model


# ---- files

def test_an_adapters_file_says_what_it_is(tmp_path):
    "Rank, alpha and layers come from the file: with alpha 32 the logits used to differ from PEFT's own by far."
    torch.manual_seed(0)
    model = add_adapters(llama().model, ("extraction",), r=8, alpha=32, target_modules=["q_proj", "v_proj"])
    with torch.no_grad():
        for k, p in model.named_parameters():
            if "lora_B" in k: p.normal_()
    from comam_nb.lm.lora import save_adapter
    save_adapter(model, "extraction", tmp_path / "extraction")
    want = PeftModel.from_pretrained(llama().model, tmp_path / "extraction").eval()(IDS).logits
    team = make_team(llama(), r=4)
    team.load(tmp_path, ["extraction"])
    assert torch.equal(scores(team)["extraction"], want)
    assert (team["extraction"].policy.model.peft_config["extraction"].r,
            team["extraction"].policy.model.peft_config["extraction"].lora_alpha) == (8, 32)
    assert len(team.groups()["extraction",]) == 2 * 2 * 2 and all(p.requires_grad for p in team.groups()["extraction",])

def test_what_a_team_writes_plain_peft_reads(tmp_path):
    team = papers_own()
    with torch.no_grad():
        for ps in team.groups().values():
            for p in ps: p.add_(0.1)
    team.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(AGENTS)
    want = scores(team)
    for name, base in (("profile", llama()), ("retrieval", llama(width=32))):
        assert torch.allclose(PeftModel.from_pretrained(base.model, tmp_path / name).eval()(IDS).logits, want[name],
                              atol=1e-6)

def test_the_weights_that_ship_with_the_package_load():
    from comam_nb.worlds.warm_start import load_warm_start
    folder = Path(comam_nb.__file__).parent / "weights"
    for name in ("microworld_trained", "memory_r1/warm"):
        team = make_team(load_warm_start())
        before = scores(team)
        team.load(folder / name)
        assert all(not torch.equal(before[n], x) for n, x in scores(team).items())
    team.load(folder / "memory_r1" / "trained", ("profile", "retrieval")) # there is no extraction agent in it

def test_files_that_do_not_fit(tmp_path):
    three_families().save(tmp_path)
    with pytest.raises(BackboneError, match="another model's weights"):
        make_team({"extraction": llama(1, 32), "profile": gpt2(), "retrieval": llama()}, "separate").load(tmp_path)
    with pytest.raises(BackboneError, match="another model's weights: lm_head"): # its head is a matrix of its own
        make_team({"extraction": llama(1), "profile": gpt2(), "retrieval": llama(2, 32)}, "separate").load(tmp_path)
    with pytest.raises(BackboneError, match="no such file"): adapters().load(tmp_path)
    with pytest.raises(BackboneError, match="no weights there"): three_families().load(tmp_path / "nowhere")
    papers_own().save(tmp_path / "small")
    with pytest.raises(BackboneError, match="another model"): make_team(llama(width=32)).load(tmp_path / "small")


# ---- what a team refuses

def test_bad_teams(tmp_path):
    with pytest.raises(BackboneError, match="unknown policy mode"): make_team(llama(), "alone")
    with pytest.raises(BackboneError, match="a dict: a backbone for each"): make_team(llama(), "separate")
    with pytest.raises(BackboneError, match="no local model"):
        Team({"profile": ProfileAgent(Scripted([""]))}, trained=["profile"])
    with pytest.raises(BackboneError, match="names no adapter"):
        Team({"other": ProfileAgent(adapters()["profile"].policy)})
    with pytest.raises(BackboneError, match="has no adapter 'mine'"): Team({"profile": ProfileAgent(llama(), "mine")})
    with pytest.raises(CreditError, match="profile agent is frozen"):
        train(tmp_path, one_frozen(), trained_agents=["extraction", "profile"])
    with pytest.raises(BackboneError, match="no local model"):
        train(tmp_path, all_kinds(), trained_agents=["retrieval"])

def test_a_team_is_a_mapping_of_agents():
    team = adapters()
    assert list(team) == list(AGENTS) and len(team) == 3 and {**team}["profile"] is team["profile"]
    team["profile"] = ProfileAgent(Scripted(["a line [1]"]))
    assert team.trained == ("extraction", "retrieval") and team.judge.backbone.model is team["extraction"].policy.model
    assert not hasattr(team, "__delitem__") # a team keeps its three seats

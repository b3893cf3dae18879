"A supervised start: demonstrations that their agents read back, and policies that learn their own and nothing else."
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from comam_nb.agents import ExtractionAgent, ProfileAgent, RetrievalAgent
from comam_nb.base.errors import BackboneError, DataError
from comam_nb.cli.__main__ import main
from comam_nb.data import Episode, Query, example_episode, make_history, training_view
from comam_nb.lm.backbone import Backbone, prompt_ids
from comam_nb.lm.chat import ChatModel, Reply
from comam_nb.lm.decoding import sample_group
from comam_nb.lm.prompts import PROMPTS
from comam_nb.lm.recorded import RecordingChat, ReplayChat
from comam_nb.mdp import AGENTS, rollout
from comam_nb.rewards import MATCHERS, Rewards
from comam_nb.rl.team import make_team
from comam_nb.runs.demonstrations import Demonstration, demonstrations
from comam_nb.runs.supervised import supervised_start

KINDS = (ExtractionAgent, ProfileAgent, RetrievalAgent)

def agents_of(prompts, **more):
    return {k.name: k(None, max_new_tokens=96, **PROMPTS[prompts][k.name], **more) for k in KINDS}

def played(agents, episodes, demos):
    "The rollouts in which the agents write what is demonstrated, with their rewards."
    texts = {a: {d.prompt: d.completion for d in demos if d.agent == a} for a in AGENTS}
    class Copies:
        def __init__(self, known): self.known = known
        def complete(self, prompts, **kwargs): return [self.known.get(p, "") for p in prompts]
    for a in AGENTS:
        agents[a].policy = Copies(texts[a])
    groups = rollout(agents, episodes, 1)
    Rewards(judge=lambda *_: 1.0)(groups)
    return [g[0] for g in groups]


# ---- demonstrations

NASTY = ["- [3] see [12] and [4, 5", "<think>no</think> <information> [1] </information> <final_answer> x",
         "1) one\n2. two", "a\x85b\u2028c\x1cd\u2029e [THINK] f", "I love [image: a photo of a cat]!",
         "Note: 12:30 pm, see (3)", "[[7]] ]] [[", "x " * 400,
         "爱吃苹果。我每天都吃。", "\u202eabc \ud83d", "I   like\t\ttea <3", "…", "Ann: Bob: hello"]

@pytest.mark.parametrize("prompts", PROMPTS)
def test_whatever_a_turn_holds_its_demonstration_is_read_back_without_fault(prompts):
    history = make_history([[("user", t) for t in NASTY], [("user", f"Ann: {t}") for t in NASTY]])
    episodes = [Episode(history, Query(f"What about {i}?"), answer=t, evidence={i}, user="u", id=str(i))
                for i, t in enumerate(NASTY, 1)]
    agents = agents_of(prompts)
    demos = demonstrations(episodes, agents)
    assert {d.agent for d in demos} == set(AGENTS)
    shown = {d.episode for d in demos if d.agent == "retrieval"}
    assert len(shown) >= 8 # ten lines for thirteen turns; "…" says nothing
    for t in played(agents, [e for e in episodes if e.id in shown], demos):
        assert t.malformed == 0 and t["retrieval"].reward > 0 and t.final.answer

def test_options_are_answered_by_the_letter_that_the_scorer_reads():
    for letter, text in zip("abcd", ("tea", "milk", "water", "coffee")):
        e = replace(example_episode(), options=("tea", "milk", "water", "coffee"), answer=letter)
        for prompts in PROMPTS:
            agents = agents_of(prompts)
            t, = played(agents, [e], demonstrations([e], agents))
            assert (t.final.answer, t.answer_reward, t["extraction"].reward) == (f"({letter})", 1, 1)

def test_a_turn_that_another_question_of_the_same_person_needs_is_worth_keeping():
    history = make_history([[("user", "I own a cat."), ("assistant", "Nice."), ("user", "I live in Rome.")]])
    def ask(i, turn, **more):
        return Episode(history, Query(f"q{i}?"), answer="x", evidence={turn}, id=f"{i}", **{"user": "a", **more})
    agents, mine = agents_of("few-shot"), ask(1, 1)
    alone = demonstrations([mine], agents)[0].completion
    assert alone == "1] The user: I own a cat."
    assert demonstrations([mine, ask(2, 3)], agents)[0].completion == f"{alone}\n[3] The user: I live in Rome."
    assert demonstrations([mine, ask(2, 3, user="b")], agents)[0].completion == alone

def test_what_does_not_fit_is_cut_and_what_cannot_be_shown_is_left_out_and_said(capsys):
    long = "We drove through hills, and then, after the rain, my sister Zoe met the famous painter Mira at noon " * 3
    history = make_history([[("user", f"{long}. {i}") for i in range(6)]])
    ask = lambda i, evidence: Episode(history, Query("Who met the painter Mira?"), answer="Zoe", evidence=evidence,
                                      user="u", id=str(i))
    agents = agents_of("few-shot")
    demos = demonstrations([ask(1, {1, 2}), replace(ask(2, {3}), evidence=frozenset(), evidence_kind="none")], agents)
    assert "1 of 2 questions cannot be shown" in capsys.readouterr().out
    lines = demos[0].completion.splitlines()
    assert len(demos[0].completion) // 4 < 96 and all("painter Mira" in line for line in lines)
    with pytest.raises(DataError, match="none of 1 episodes has evidence.*weak_evidence"):
        demonstrations([replace(ask(1, {1}), evidence=frozenset())], agents)
    class Other(ExtractionAgent):
        def parse(self, text, state): return super().parse(text.upper(), state)
    with pytest.raises(DataError, match="extraction agent.*another format"):
        demonstrations([ask(1, {1})], {**agents, "extraction": Other(max_new_tokens=96)})

def test_locomo_s_demonstrations_earn_the_rewards(shared):
    from comam_nb.readers.locomo import read_locomo
    episodes = [training_view(e) for e in read_locomo(shared / "locomo" / "locomo_first7.json")
                if e.evidence and e.user == "conv-26"]
    agents = agents_of("few-shot")
    demos = demonstrations(episodes, agents)
    shown = {d.episode for d in demos if d.agent == "retrieval"}
    assert len(shown) > 0.8 * len(episodes) # whole sessions hold more than ten turns that some question needs
    trips = played(agents, [e for e in episodes if e.id in shown], demos)
    assert all(t.malformed == 0 and t.answer_reward == 1 for t in trips)
    for name in ("citation", "citation+words"):
        Rewards(judge=lambda *_: 1.0, matcher=MATCHERS[name])([[t] for t in trips])
        mean = {a: sum(t[a].reward for t in trips) / len(trips) for a in AGENTS}
        assert mean["extraction"] > 0.8 and mean["retrieval"] > 0.95, (name, mean)
    dated = [n.text for t in trips for n in t["extraction"].action.notes]
    assert all(n.split(",")[0] in ("Caroline", "Melanie") and " 2023: " in n for n in dated), dated


class Says(ChatModel):
    "A teacher that knows the example."
    name, asked = "says", 0
    def chat(self, messages, max_tokens=512, temperature=0.0, seed=None, top_p=None):
        self.asked += 1
        text = messages[-1]["content"]
        if "List at most" in text: return Reply("Drank coffee. [3]\nDrinks tea. [7]" if seed else "Nothing of note.")
        if "preferences" in text: return Reply("<think>hm</think>Moved from coffee to tea. [1] [2]")
        return Reply("<information> [1] [2] </information> <final_answer> It is tea. </final_answer>")

def test_a_teacher_s_reply_is_kept_where_it_earns_the_reward_and_can_be_replayed(tmp_path):
    teacher, agents, e = Says(), agents_of("few-shot"), example_episode()
    demos = demonstrations([e], agents, RecordingChat(teacher, tmp_path / "said.jsonl"))
    assert [d.source for d in demos] == ["says"] * 3 and teacher.asked == 12
    assert demos[0].completion == "3] Drank coffee.\n[7] Drinks tea."
    assert demos[2].completion.endswith("<final_answer> tea </final_answer>") # gold, not "It is tea."
    assert demonstrations([e], agents, ReplayChat(tmp_path / "said.jsonl")) == demos
    one = demonstrations([e], agents, Says(), tries=1)
    assert one[0].source == "gold" and "coffee" in one[0].completion


# ---- learning

def words(i):
    return [Demonstration("extraction", f"user: I own {i} cats. [1]\nFacts:\n[", f"1] The user owns {i} cats."),
            Demonstration("profile", f"The user owns {i} cats. [1]\nProfile:\n[", "1] The user likes cats."),
            Demonstration("retrieval", f"The user owns {i} cats. [1]\nHow many?\n <information> [",
                          f"1] </information> <final_answer> {i} </final_answer>")]

def silent(line): pass

TRAINING, VALIDATION = [d for i in range(1, 9) for d in words(i)], words(9)

@pytest.fixture(scope="module")
def tok():
    bpe = ByteLevelBPETokenizer()
    texts = [d.prompt + d.completion for d in TRAINING]
    bpe.train_from_iterator(texts, 400, special_tokens=["<pad>", "<eos>", "<turn>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>",
                                   padding_side="left")

def tiny(tok, **more):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tok), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=4096,
                         initializer_range=0.3, eos_token_id=1, pad_token_id=0, bos_token_id=None)
    return Backbone(LlamaForCausalLM(config).eval(), tok, (), "tiny", **more)

def team_on(models, policy="adapters", **more):
    return make_team(models, policy, extraction=dict(opening="["), profile=dict(opening="["),
                     retrieval=dict(opening=" <information> ["), **more)

def weights(model): return {k: p.detach().clone() for k, p in model.named_parameters()}

def moved(before, model): return {k for k, p in model.named_parameters() if not torch.equal(before[k], p)}

def test_an_adapter_learns_its_own_demonstrations_and_nothing_else_moves(tok, tmp_path):
    team = team_on(tiny(tok), trained=["profile"])
    model = team["profile"].policy.model
    before, switches = weights(model), [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    base = model.get_base_model()
    came = supervised_start(team, TRAINING, VALIDATION, tmp_path, steps=30, lr=1e-2, every=10, say=silent)
    assert moved(before, model) and all(".lora_" in k and ".profile." in k for k in moved(before, model))
    assert [p.requires_grad for p in model.parameters()] == switches
    assert [m.training for m in model.modules()] == modes
    assert "forward" not in base.__dict__ and "_original_forward" not in base.__dict__
    assert list(came) == ["profile"]
    assert came["profile"]["validation_after"] < 0.5 < came["profile"]["validation_before"]
    written, = sample_group(team["profile"].policy, [VALIDATION[1].prompt], 1, "profile", temperature=0)
    assert (written[0].text, written[0].ids[-1]) == (VALIDATION[1].completion, 1)
    again = team_on(tiny(tok))
    again.load(tmp_path / "weights", ["profile"])
    a, b = weights(model), weights(again["profile"].policy.model)
    assert all(torch.equal(a[k], b[k]) for k in a if ".profile." in k)

def test_a_model_in_bfloat16_learns_and_is_left_as_it_was(tok, tmp_path):
    policy = tiny(tok)
    policy.model.to(torch.bfloat16)
    team = team_on(policy, trained=["profile"])
    model = team["profile"].policy.model
    came = supervised_start(team, TRAINING, VALIDATION, tmp_path, steps=6, lr=1e-2, every=3, say=silent)["profile"]
    assert came["validation_after"] < came["validation_before"]
    for m in (model, model.get_base_model()): assert not {"forward", "_original_forward"} & m.__dict__.keys()

@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.role }}: {{ m.content }}<turn>{% endfor %}"
                                      "{% if add_generation_prompt %}assistant: {% endif %}"])
def test_the_loss_is_that_of_the_completion_and_its_end_as_the_agent_is_asked(tok, tmp_path, template):
    policy = tiny(tok)
    tok.chat_template, end = template, 2 if template else 1
    policy.model.generation_config.eos_token_id = [1, 2]
    try:
        team, d = team_on(policy, trained=["profile"]), TRAINING[1]
        head = prompt_ids(team["profile"].policy, d.prompt)
        tail = [*tok(d.completion, add_special_tokens=False).input_ids, end]
        with torch.no_grad(): logits = policy.model(torch.tensor([head + tail])).logits[0, len(head) - 1:-1]
        nats = torch.nn.functional.cross_entropy(logits.float(), torch.tensor(tail)).item()
        came = supervised_start(team, [d], [], tmp_path, steps=1, say=silent)["profile"]
    finally: tok.chat_template = None
    assert came["train_before"] == pytest.approx(nats, abs=1e-5)
    assert came["validation_before"] is None and came["steps"] == 1

def test_rows_of_unequal_length_count_as_if_each_were_alone(tok, tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tok), n_embd=32, n_layer=2, n_head=2, n_positions=512, eos_token_id=1,
                        bos_token_id=None, pad_token_id=0, initializer_range=0.3) # positions count from the first word
    policy = Backbone(GPT2LMHeadModel(config).eval(), tok, (), "gpt2")
    team = team_on(policy, trained=["profile"])
    demos = [TRAINING[1], replace(TRAINING[4], prompt="More. " + TRAINING[4].prompt, completion="1] cats")]
    nats, words = 0.0, 0
    for d in demos:
        head, tail = tok(d.prompt).input_ids, [*tok(d.completion).input_ids, 1]
        with torch.no_grad(): logits = policy.model(torch.tensor([head + tail])).logits[0, len(head) - 1:-1]
        nats += torch.nn.functional.cross_entropy(logits, torch.tensor(tail), reduction="sum").item()
        words += len(tail)
    came = supervised_start(team, demos, [], tmp_path, steps=1, say=silent)["profile"]
    assert came["train_before"] == pytest.approx(nats / words, abs=1e-5)

@pytest.mark.parametrize("policy, names", [("shared", ["extraction-profile-retrieval"]),
    pytest.param("separate", list(AGENTS), marks=pytest.mark.slow)])
def test_agents_that_share_a_policy_learn_together_and_whole_models_learn_alone(tok, tmp_path, policy, names):
    models = {a: tiny(tok) for a in AGENTS} if policy == "separate" else tiny(tok)
    team = team_on(models, policy)
    judged = team.judge.choice_probs(["Is it?"], ("a", "b"))
    came = supervised_start(team, TRAINING, VALIDATION, tmp_path, steps=15, lr=3e-3, every=5, say=silent)
    assert list(came) == names
    assert all(x["validation_after"] < x["validation_before"] for x in came.values())
    assert torch.equal(team.judge.choice_probs(["Is it?"], ("a", "b")), judged)
    again = team_on({a: tiny(tok) for a in AGENTS} if policy == "separate" else tiny(tok), policy)
    again.load(tmp_path / "weights")
    for a in AGENTS:
        x, y = weights(team[a].policy.model), weights(again[a].policy.model)
        assert all(torch.equal(x[k], y[k]) for k in x)

def test_it_stops_when_validation_no_longer_improves_and_keeps_the_best(tok, tmp_path):
    team, lines = team_on(tiny(tok), trained=["profile"]), []
    wrong = [replace(VALIDATION[1], completion="1] How many? owns Facts: 3 4 5")]
    came = supervised_start(team, TRAINING, wrong, tmp_path, steps=200, lr=1e-2, every=5, patience=2, say=lines.append)
    came = came["profile"]
    assert came["steps"] < 200 and came["steps"] == came["best_step"] + 10
    log = [json.loads(line) for line in (tmp_path / "warm_start.jsonl").read_text().splitlines()]
    losses = {x["step"]: x["validation_loss"] for x in log if "done" not in x}
    assert min(losses[s] for s in losses if s) == losses[came["best_step"]]
    assert came["validation_after"] == pytest.approx(losses[came["best_step"]], abs=1e-3)
    assert len(lines) == len(losses) and list(losses)[:3] == [0, 5, 10] and "validation" in lines[0]

@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tok, tmp_path):
    def start(name, resume=False, press=None):
        def say(line):
            if press and press in line: os.kill(os.getpid(), signal.SIGINT)
        team = team_on(tiny(tok), trained=["extraction", "profile"])
        came = supervised_start(team, TRAINING, VALIDATION, tmp_path / name, steps=12, lr=1e-2, every=4, resume=resume,
                                say=say)
        return came, weights(team["profile"].policy.model)
    straight, w = start("straight")
    with pytest.raises(KeyboardInterrupt, match="profile stopped after step"): start("stopped", press="profile, step 4")
    assert (tmp_path / "stopped" / "checkpoints" / "profile").is_dir()
    with open(tmp_path / "stopped" / "warm_start.jsonl", "a") as f: f.write('{"agent": "profile", "st') # killed there
    (tmp_path / "stopped" / "checkpoints" / "profile" / "before.json").write_text("[2.5, ")
    came, v = start("stopped", resume=True)
    assert came == straight and all(torch.equal(w[k], v[k]) for k in w)
    log = (tmp_path / "stopped" / "warm_start.jsonl").read_text().splitlines()
    steps = [(x["agent"], x["step"], "done" in x) for x in map(json.loads, log)]
    assert len(steps) == len(set(steps)) and not (tmp_path / "stopped" / "checkpoints").exists()

def test_what_cannot_be_learned_is_refused_before_anything_is_written(tok, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="no demonstration for profile"):
        supervised_start(team_on(tiny(tok)), TRAINING[:1], [], out)
    with pytest.raises(BackboneError, match="takes 20"):
        supervised_start(team_on(tiny(tok, context=20)), TRAINING, [], out, say=silent)
    assert not (out / "weights").exists()


# ---- the command

def conversation(i):
    "A small LoCoMo conversation."
    said = [("Ann", f"Hi Bob! I own {i} cats, and I love them."), ("Bob", "Nice, how are they?"),
            ("Ann", f"They sleep. Yesterday I bought {i} cushions."), ("Bob", f"I live in town number {i}.")]
    turns = [{"speaker": s, "dia_id": f"D1:{n}", "text": t} for n, (s, t) in enumerate(said, 1)]
    qa = [{"question": "How many cats does Ann own?", "answer": i, "evidence": ["D1:1"], "category": 1},
          {"question": "Where does Bob live?", "answer": f"town number {i}", "evidence": ["D1:4"], "category": 1}]
    return {"sample_id": f"c{i}", "qa": qa, "conversation": {"speaker_a": "Ann", "speaker_b": "Bob", "session_1": turns,
                                                             "session_1_date_time": "1:56 pm on 8 May, 2023"}}

@pytest.fixture
def command(tok, tmp_path):
    policy, data = tiny(tok), tmp_path / "data.json"
    policy.model.save_pretrained(tmp_path / "model")
    tok.save_pretrained(tmp_path / "model")
    data.write_text(json.dumps([conversation(i) for i in range(1, 6)]))
    return ["warm-start", "--backbone", str(tmp_path / "model"), "--data", f"locomo:{data}", "--prompts", "few-shot",
            "--max-new-tokens", "200", "--max-prompt-tokens", "3000", "--device", "cpu", "--steps", "4", "--eval-steps",
            "2", "--out", str(tmp_path / "out")]

def test_the_command_writes_a_run_that_says_what_it_was_shown(command, tmp_path, capsys):
    assert main(command) == 0
    said, out = capsys.readouterr().out, tmp_path / "out"
    assert "extraction, step 2 of 4: loss" in said and "comam train --from" in said
    assert {p.name for p in out.iterdir()} >= {"config.json", "episodes.json", "demonstrations.jsonl", "summary.json",
                                               "warm_start.jsonl", "weights"}
    ids = json.loads((out / "episodes.json").read_text())
    assert [len(ids[part]) for part in ("training", "validation", "test")] == [6, 2, 2]
    shown = [json.loads(line) for line in (out / "demonstrations.jsonl").read_text().splitlines()]
    users = {part: {d["episode"].split("/")[0] for d in shown if d["part"] == part} for part in ids}
    assert len(users["training"]) == 3 and len(users["validation"]) == 1 and not users["test"]
    assert not users["training"] & users["validation"]
    assert {p.name for p in (out / "weights").iterdir()} == set(AGENTS)
    came = json.loads((out / "summary.json").read_text())["policies"]
    assert set(came) == set(AGENTS) and all(x["train_after"] < x["train_before"] for x in came.values())
    weights = (out / "weights" / "profile" / "adapter_model.safetensors").read_bytes()
    assert main([*command, "--resume"]) == 0 # done: nothing is taught again
    assert (out / "weights" / "profile" / "adapter_model.safetensors").read_bytes() == weights
    assert main([*command, "--resume", "--lr", "1e-3"]) == 2
    assert "lr was 0.0002, now 0.001" in capsys.readouterr().err

def test_the_command_refuses_in_one_line_and_leaves_nothing(command, tmp_path, capsys):
    data = tmp_path / "data.json"
    bad = json.loads(data.read_text())
    for c in bad:
        for q in c["qa"]: q["evidence"] = []
    (tmp_path / "bare.json").write_text(json.dumps(bad))
    for more, why in ((["--data", f"locomo:{tmp_path / 'bare.json'}"], "no question with evidence"),
                      (["--lr", "0"], "--lr must be above 0"),
                      (["--steps", "0"], "--steps must be at least 1"), (["--record", "x"], "goes with --teacher"),
                      (["--teacher", "ftp://x"], "ftp://x"), (["--max-new-tokens", "3"], "none fits its 3 tokens")):
        assert main([*command, *more]) == 2, more
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and why in lines[0], (more, lines)
        assert not (tmp_path / "out").exists()

@pytest.mark.slow
def test_the_micro_world_s_teacher_gives_a_language_model_its_start(command, tmp_path, capsys):
    command[command.index("--data") + 1] = "microworld"
    at = command.index("--max-prompt-tokens")
    assert main(command) == 2
    assert "--max-prompt-tokens goes with other --data" in capsys.readouterr().err
    assert main([*command[:at], *command[at + 2:]]) == 0
    shown = [json.loads(line) for line in (tmp_path / "out" / "demonstrations.jsonl").read_text().splitlines()]
    extraction, profile, retrieval = ([d["completion"] for d in shown if d["agent"] == a] for a in AGENTS)
    assert all("] loves the " in t for t in extraction) and all("] prefers the " in t for t in profile)
    assert retrieval and len(extraction) > 16 < len({d["episode"] for d in shown})

@pytest.mark.slow
def test_a_recorded_teacher_serves_the_command(command, tmp_path, monkeypatch):
    class Dull(ChatModel):
        name = "dull"
        def chat(self, messages, max_tokens=512, temperature=0.0, seed=None, top_p=None):
            return Reply("Ann is mentioned. [1]")
    said = tmp_path / "said.jsonl"
    with monkeypatch.context() as m:
        m.setattr("comam_nb.lm.recorded.open_chat", lambda spec: Dull())
        assert main([*command, "--teacher", "http://nowhere/v1#dull", "--record", str(said)]) == 0
    replay = [*command[:-1], str(tmp_path / "again"), "--teacher", f"replay:{said}"]
    assert main(replay) == 0
    a, b = ((tmp_path / name / "demonstrations.jsonl").read_text() for name in ("out", "again"))
    assert a == b and '"source": "dull"' in a and '"source": "gold"' in a

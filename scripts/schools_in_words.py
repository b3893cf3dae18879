"""MemCollab between two language models that went to different schools, stage by stage; every stage can be resumed.

    python scripts/schools_in_words.py teach --school primary --model DIR --out runs/words
    python scripts/schools_in_words.py teach --school a --model DIR --out runs/words       # and b, from primary
    # first: do true lessons help?
    python scripts/schools_in_words.py arms --arms vanilla oracle --model DIR --out runs/words
    python scripts/schools_in_words.py distil --seed 0 --model DIR --out runs/words
    python scripts/schools_in_words.py arms --seed 0 --model DIR --out runs/words   # all arms, but those that are there
    python scripts/schools_in_words.py table --model DIR --out runs/words

DIR is a model directory, a .gguf file or a hub id (HuggingFaceTB/SmolLM2-135M-Instruct).
"""
import argparse, sys

from comam_nb.studies.schools_in_words import WordSchools

def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("stage", choices=("teach", "distil", "arms", "table"))
    p.add_argument("--model", required=True, help="model directory, .gguf file or hub id")
    p.add_argument("--out", required=True, help="folder of the run")
    p.add_argument("--school", choices=("primary", "a", "b"), help="whose pupil to teach")
    p.add_argument("--rows", type=int, help="rows of the schoolbook (default 160 in the primary school, 400 after it)")
    p.add_argument("--start", help="adapter's folder to go on from, for a second course (default the primary school's)")
    p.add_argument("--resume", action="store_true", help="teach: go on from the last checkpoint")
    p.add_argument("--layers", help="which layers get an adapter: a regular expression, or all-linear")
    p.add_argument("--seed", type=int, default=0, help="of tasks, sampling and lots (default 0)")
    p.add_argument("--arms", nargs="+", help="only these arms, such as vanilla oracle")
    p.add_argument("--train", type=int, default=36, help="training tasks (default 36)")
    p.add_argument("--test", type=int, default=75, help="held-out tasks (default 75)")
    p.add_argument("--batch", type=int, default=75, help="conversations at once (default 75)")
    return p

def main(argv=None) -> int:
    args = parser().parse_args(argv)
    say = lambda line: print(line, flush=True)
    schools = WordSchools(args.model, args.out, say, train=args.train, test=args.test, batch_size=args.batch)
    if args.stage == "teach":
        if not args.school: parser().error("teach: name a --school")
        more = {"layers": args.layers} if args.layers else {}
        say(schools.teach(args.school, args.rows, args.seed, args.resume, args.start, **more))
    if args.stage == "distil": schools.distil(args.seed)
    if args.stage == "arms": schools.arms(args.seed, args.arms)
    if args.stage == "table": say(schools.table())
    return 0

if __name__ == "__main__": sys.exit(main())

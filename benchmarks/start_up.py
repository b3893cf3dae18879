"""How long a new process takes to `import comam_nb` and to print the help of both commands.

Beside them an empty Python and `import trl`.

Each is started ten times, in turn, and the median is shown.
The first round, in which files come from the disk, is not counted.

    python benchmarks/start_up.py [--rounds 10]
"""
import argparse, os, platform, statistics, subprocess, sys, time
from importlib.metadata import version

WAYS = {
    "python -c pass": ["-c", "pass"],
    "import comam_nb": ["-c", "import comam_nb"],
    "comam --help": ["-m", "comam_nb.cli", "--help"],
    "memcollab --help": ["-m", "comam_nb.cli.memcollab", "--help"],
    "import trl": ["-c", "import trl"],
    "from trl import GRPOTrainer": ["-c", "from trl import GRPOTrainer"],
}
MAIN = "import sys; from {} import main; sys.exit(main(['--help']))" # what the installed scripts do


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=10)
    args = p.parse_args()
    from machine import about
    print(about(), flush=True)
    print(f"Python {platform.python_version()}, trl {version('trl')}, {os.cpu_count()} cores, {args.rounds} rounds")
    seconds = {name: [] for name in WAYS}
    for n in range(args.rounds + 1):
        for name, words in WAYS.items():
            if words[0] == "-m": words = ["-c", MAIN.format(words[1])]
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            if n: seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    for name, m in medians.items(): print(f"{name:<28}{m:7.3f} s")
    print(f"import comam_nb: {medians['import comam_nb']:.3f} s (an empty Python {medians['python -c pass']:.3f} s); "
          f"import trl: {medians['import trl']:.3f} s, its GRPOTrainer {medians['from trl import GRPOTrainer']:.3f} s")
    print(f"comam --help: {medians['comam --help']:.3f} s; memcollab --help: {medians['memcollab --help']:.3f} s")


if __name__ == "__main__": main()

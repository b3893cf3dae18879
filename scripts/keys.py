"""Keys, passwords and logins that were ever committed: reads every line that any commit of any branch added.

    python scripts/keys.py    # a line for each find: how often, what; exit code 1 if there is one

It needs no network and knows the forms below. What tests plant on purpose is in PLANTED. A key that was pushed once is
known to the world, also when a later commit takes it away: revoke it first.
"""
import re, subprocess, sys
from collections import Counter

from address import ROOT

FORMS = { # what -> as it looks
    "Amazon": r"\bAKIA[0-9A-Z]{16}\b",
    "GitHub": r"\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{50,}",
    "GitLab": r"\bglpat-[\w-]{20,}",
    "OpenAI, Anthropic and the like": r"\bsk-[\w-]{20,}",
    "Hugging Face": r"\bhf_[A-Za-z0-9]{30,}",
    "Slack": r"\bxox[abprs]-[\w-]{10,}",
    "Google": r"\bAIza[\w-]{35}",
    "PyPI": r"\bpypi-[\w-]{50,}",
    "a signed token": r"\beyJ[\w-]{15,}\.eyJ[\w-]{15,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a login in an address": r"\b[a-z][a-z0-9+]*://[^/\s:@\"'{]+:[^/\s@\"'{]{3,}@",
    "a password in the code": r"\b(?:password|passwd|secret|api_?key|access_?token)[\"']? *[:=] *"
                              r"[\"'][^\"'\s{}]{12,}[\"']",
}
KNOWN = re.compile("|".join(f"({form})" for form in FORMS.values()), re.I)
CASE = re.compile("|".join(f"({form})" for form in FORMS.values()))
PLANTED = re.compile(r"geheim|teapot|user:pass@|ana:tea@|Zwetschgenknödel|sk-secret-1234|sk-planted")

def finds(lines):
    "(what, text) for each key in some lines; a name such as api_key in any case, the rest as it is given out."
    for line in lines:
        for m in KNOWN.finditer(line):
            what = list(FORMS)[m.lastindex - 1]
            if m.lastindex < len(FORMS) and not CASE.search(m[0]): continue
            if not PLANTED.search(m[0]): yield what, m[0]

def added():
    "Every line that a commit added."
    log = subprocess.Popen(["git", "-C", str(ROOT), "log", "--all", "-p", "--unified=0", "--no-color", "--no-ext-diff"],
                           stdout=subprocess.PIPE, text=True, encoding="utf-8", errors="replace")
    yield from (line[1:] for line in log.stdout if line.startswith("+"))
    if log.wait(): raise SystemExit(f"git log failed with {log.returncode}")

def main():
    found = Counter(finds(added()))
    for (what, text), times in found.most_common(): print(f"{times:5} {what}: {text[:12]}…")
    return int(bool(found))

if __name__ == "__main__": sys.exit(main())

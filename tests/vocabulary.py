"""Fail on words that the glossary in CONTRIBUTING.md has replaced: ``python tests/vocabulary.py``."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

RETIRED = {
    r"stands? still|standing still": "frozen weights, prepacked weights",
    r"told from": "computed from the saved output",
    r"pass(es)? of (its|their) own": "standalone prologue kernel",
    r"(?<!_)multiprocessors?(?!_)": "SM; CTAs per SM",
    r"held against": "compared with, checked against",
    r"put together by": "merged, reduced",
    r"answers?": "expected result",
    r"as a rule": "usually, by default",
    r"anew": "again; rebuilt, recomputed",
    r"apt to": "likely to",
    r"crew": "adaptive thread count",
    r"(?<![\"'-])contestants?|rivals?": "baseline, provider",
    r"likewise": "a full sentence",
    r"as the seed|the seed's (loop|step|recipe|transform|order)|seed_step": "the reference recipe",
    r"Gather": "partial sums",
    r"_stamp|_facts": "fingerprint, guards",
    r"_apart|_both_apart|pass_kernel": "standalone prologue",
    r"programs a|programs per SM": "CTAs per SM",
    r"chunks_seconds|_chunks_kernel|split-K chunks?": "split-K partials",
}
"""Regular expressions for whole words, and what to write instead."""

SUFFIXES = {".py", ".h", ".cpp", ".md", ".toml", ".yml", ".yaml", ""}
EXEMPT = {"tests/vocabulary.py", "tests/test_vocabulary.py", "CHANGELOG.md", "LICENSE"}


def findings(text: str) -> list[tuple[int, str, str]]:
    """Return (line number, retired word, replacement) for each use of a retired word."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, instead in RETIRED.items():
            found += [
                (number, match[0], instead)
                for match in re.finditer(rf"(?<![A-Za-z])(?:{pattern})(?![A-Za-z])", line)
            ]
    return found


def main() -> int:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True)
    failed = 0
    for name in listed.stdout.split("\n"):
        path = Path(name)
        if name in EXEMPT or path.suffix not in SUFFIXES or not path.is_file():
            continue
        for number, word, instead in findings(path.read_text()):
            print(f"{name}:{number}: '{word}' is retired; write: {instead} (see CONTRIBUTING.md)")
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())

"""A rule of `make check`: docstrings open with a verb or a noun, and sentences name their actor.

A docstring that opens with a relative clause ("What is left of ...") hides the verb, and "whoever" hides the actor.
Prints a line for each breach, `file:line: words`, and exits with 1 if there is one.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

OPENS_ASKEW = re.compile(r"(What|Whether|How|Where|Why)\b(?!.*\?)")
NAMES_NO_ACTOR = re.compile(r"\b(whoever|whomever|nobody|somebody|heeds?|heeded)\b", re.IGNORECASE)
PROSE = (".py", ".md", ".html", ".js", ".css", ".sh", ".yaml", ".toml")


def main() -> int:
    here = Path(__file__)
    names = subprocess.check_output(["git", "ls-files"], cwd=here.parents[1], text=True).split("\n")
    files = [
        here.parents[1] / name for name in names if name.endswith(PROSE) and name != "tests/plain_english.py"
    ]
    breaches = [breach for file in files if file.is_file() for breach in breaches_of(file)]
    print("\n".join(breaches) or f"{len(files)} files: plain English")
    return int(bool(breaches))


def breaches_of(file: Path) -> Iterator[str]:
    text = file.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), start=1):
        if found := NAMES_NO_ACTOR.search(line):
            yield f"{file}:{number}: '{found[0]}': name the one who acts"
    if file.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                opening = str(node.value.value).strip().split("\n")[0]
                if OPENS_ASKEW.match(opening):
                    yield f"{file}:{node.lineno}: '{opening}': begin with a verb or a noun"


if __name__ == "__main__":
    sys.exit(main())

"""A stand-in for Pyxis, a plugin of srun that needs Enroot: an srun that records its words and drops the options.

The real srun starts the command outside of any container, with the `python3` beside this program first in PATH.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path


def main() -> None:
    """Run `srun` without Pyxis's options."""
    folder = Path(__file__).parent
    with (folder / "started.jsonl").open("a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\n")
    places = [place for place in os.environ["PATH"].split(os.pathsep) if Path(place) != folder]
    real = shutil.which("srun", path=os.pathsep.join(places))
    assert real is not None
    if any(word.startswith("--container-image") for word in sys.argv):
        os.environ["PATH"] = os.pathsep.join([str(folder / "bin"), *places])
    plain = [word for word in sys.argv[1:] if not re.match(r"--(no-)?container-", word)]
    os.execv(real, ["srun", *plain])


main()

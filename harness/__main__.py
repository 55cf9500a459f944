"""`python -m harness` is the `ssmscale` command."""

import os
import sys
from importlib.util import find_spec

if __name__ == "__main__":
    # -m searches the folder where it is called before Python's own modules, and so does an empty part of PYTHONPATH.
    here = os.getcwd()  # noqa: PTH109  # pathlib would be searched for there too
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [path for path in sys.path if path not in {"", here} or here in given]
    if find_spec("ssmttm") is None:  # a checkout that is not installed
        sys.path.append(here)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*given, here]))
    from harness.cli.app import main

    main()

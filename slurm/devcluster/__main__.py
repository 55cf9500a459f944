"""`python -m slurm.devcluster up DIR | down DIR`: a SLURM to try the harness on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from slurm.devcluster.cluster import DevCluster, Shape


def main() -> int:
    """Bring the cluster up or take it down; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m slurm.devcluster", description=__doc__)
    parser.add_argument("verb", choices=["up", "down"])
    parser.add_argument(
        "home", type=Path, metavar="DIR", help="the cluster's own directory, which down removes"
    )
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=4, help="fake GPUs a node")
    parser.add_argument("--no-accounting", action="store_true", help="keep no accounts, as on many sites")
    options = parser.parse_args()
    shape = Shape(nodes=options.nodes, gpus=options.gpus, accounting=not options.no_accounting)
    cluster = DevCluster(options.home, shape)
    try:
        if options.verb == "down":
            cluster.down()
            return 0
        cluster.up()
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, value in cluster.env.items():
        print(f"export {name}={value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

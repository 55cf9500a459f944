"""`python -m harness` is the `ssmscale` command."""

from harness.cli.app import main

if __name__ == "__main__":
    main()

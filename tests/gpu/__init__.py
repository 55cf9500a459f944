"""The check of a machine's GPU; `python -m tests.gpu --help`, or `make gpu` for all that it needs."""

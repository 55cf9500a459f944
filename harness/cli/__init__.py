"""The verbs of `ssmscale`, their options, and the tables they print."""

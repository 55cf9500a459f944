"""The error of this package for a user's mistake, distinct from defects."""


class InputError(ValueError):
    """The user's input is wrong; the message names the file, the key and the value."""

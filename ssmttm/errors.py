"""The one error this package raises for a user's mistake, so that a caller can tell it from a defect."""


class InputError(ValueError):
    """Something given by the user is wrong; the message names the file, the key and the value."""

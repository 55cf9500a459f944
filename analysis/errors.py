"""The one error that a user's input raises, so that the command line can tell it from a defect."""


class InputError(ValueError):
    """Input that cannot be used; its message is one sentence naming file, row, column and what would be right."""

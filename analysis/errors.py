"""The one error a user's input can raise here, so that a command line can tell it from a defect."""


class InputError(ValueError):
    """Input that cannot be used; its message is one sentence naming file, row, column and what would be right."""

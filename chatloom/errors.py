"""The one error a user is meant to read."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message names the place (file and line, or the params key and its value) and the remedy. Entry points print
    it without a traceback and exit with status 1; any other exception is a bug and keeps its traceback.
    """

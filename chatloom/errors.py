"""The errors a user is meant to read."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message names the place (file and line, or the params key and its value) and the remedy. Entry points print
    it without a traceback and exit with status 1; any other exception is a bug and keeps its traceback.
    """


class Unavailable(InputError):
    """What cannot be used now and may be later: a server that is down, a network that is away.

    A stage that ends with it has exit status `EX_TEMPFAIL`, and only then is it worth another try.
    """


EX_TEMPFAIL = 75
"""As in sysexits.h."""

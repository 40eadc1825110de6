"""Which strategies this version can run."""

from chatloom.config import Parallel
from chatloom.errors import InputError


def require_available(parallel: Parallel, section: str) -> None:
    """Refuse what would otherwise be silently ignored.

    Raises:
        InputError: for any strategy but `none`: this version trains in one process.
    """
    if parallel.strategy != "none":
        raise InputError(
            f"{section}.parallel.strategy = {parallel.strategy!r}: this version trains in one process; "
            "set strategy: none and num_processes: 1 (presets for several GPUs are checked, not yet run)"
        )

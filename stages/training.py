"""What stages that train begin with: their processes."""

import logging
from collections.abc import Callable

from chatloom.config import load_params
from chatloom.errors import InputError
from chatloom.parallel.launch import is_worker, run_worker, start_workers, stop_with_dvc
from stages.run import log_to_stderr

log = logging.getLogger("stages.training")


def start(name: str, main: Callable[[], None]) -> None:
    """Run the stage `name` in as many processes as its section `parallel` asks for."""
    if is_worker():
        run_worker(main)
    try:
        parallel = getattr(load_params(), name).parallel
    except InputError:
        main()  # says so, as every stage does
        return
    if parallel.num_processes == 1:
        main()
        return
    stop_with_dvc()
    with log_to_stderr():
        try:
            raise SystemExit(start_workers(f"stages.{name}", parallel))
        except InputError as error:
            log.error("%s: %s", name, error)
            raise SystemExit(1) from None

"""The chat server as a flow: started, watched, started again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from prefect import flow, get_run_logger
from pydantic import Field

from flows.parameters import Version
from tasks.notify import HOOKS
from tasks.servers import Server, watch


@flow(name="serve", flow_run_name="serve {model}", **HOOKS)
def serve(
    model: Version = "models:/chatloom@champion",
    host: str = "127.0.0.1",
    port: Annotated[int, Field(ge=1, le=65535)] = 8000,
    patience: Annotated[int, Field(ge=0)] = 5,
) -> None:
    """Serve a model over OpenAI's API until the run is cancelled; a server that ends or is stuck is started again.

    Args:
        model: The version, as models:/chatloom@champion.
        host: Address to listen on; 0.0.0.0 lets other machines in.
        port: Port to listen on.
        patience: Failures in a row, with no minute of health between, that are borne before the run fails.
    """
    command = ["chatloom.cli", "serve", "--model", model, "--host", host, "--port", str(port)]
    reached = "127.0.0.1" if host == "0.0.0.0" else host
    watch(
        lambda: Server("serve", command, Path.cwd(), os.environ, Path(".state/serve")),
        f"http://{reached}:{port}/health",
        get_run_logger().info,
        patience=patience,
    )

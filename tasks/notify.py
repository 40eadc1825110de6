"""What became of a flow run, told to whom the environment names: the log, a webhook, an e-mail."""

from __future__ import annotations

import os
import smtplib
from email.message import EmailMessage
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx
from prefect import State
from prefect.client.schemas.objects import FlowRun
from prefect.logging.loggers import flow_run_logger
from prefect.settings import PREFECT_UI_URL

from chatloom.errors import InputError

WEBHOOK, MAIL_TO, SMTP, EVENTS = (
    "CHATLOOM_NOTIFY_WEBHOOK",
    "CHATLOOM_NOTIFY_MAIL",
    "CHATLOOM_SMTP",
    "CHATLOOM_NOTIFY_ON",
)
ALL = "completed,failed,crashed,cancelled"
SECONDS = 20.0


def notify(flow: Any, flow_run: FlowRun, state: State[Any]) -> None:
    """A hook of a flow. What cannot be told is logged by Prefect and changes nothing of the run.

    Raises:
        InputError: where the environment is not understood.
    """
    if flow_run.parent_task_run_id is not None:  # the flow that it is part of tells of both
        return
    kind = state.type.value.lower()
    said = {
        "flow": flow.name,
        "run": flow_run.name,
        "state": state.name,
        "kind": kind,
        "message": (state.message or "").strip(),
        "page": f"{PREFECT_UI_URL.value() or ''}/runs/flow-run/{flow_run.id}",
    }
    log = flow_run_logger(flow_run, flow)
    log.info("%s: %s %s", said["run"], said["state"], said["message"])
    if kind not in os.environ.get(EVENTS, ALL).split(","):
        return
    if url := os.environ.get(WEBHOOK):
        # Chat servers show `text`, programs take the rest.
        text = f"{said['run']}: {said['state']}\n{said['message']}\n{said['page']}"
        httpx.post(url, json={"text": text, **said}, timeout=SECONDS).raise_for_status()
    if to := os.environ.get(MAIL_TO):
        send_mail(to, f"{said['run']}: {said['state']}", f"{said['message']}\n\n{said['page']}\n")


def send_mail(to: str, subject: str, text: str) -> None:
    """Send through the server of CHATLOOM_SMTP, `smtp://user:password@host:port`; `smtps` encrypts from the start.

    Args:
        to: addresses, with commas between them.

    Raises:
        InputError: where the server's address is missing or malformed.
    """
    server = urlsplit(os.environ.get(SMTP, ""))
    if server.scheme not in ("smtp", "smtps") or not server.hostname:
        raise InputError(f"{MAIL_TO} is set and {SMTP} is no address: write smtp://user:password@host:587")
    mail = EmailMessage()
    mail["Subject"], mail["From"], mail["To"] = subject, unquote(server.username or "") or to.split(",")[0], to
    mail.set_content(text)
    connect = smtplib.SMTP_SSL if server.scheme == "smtps" else smtplib.SMTP
    with connect(server.hostname, server.port or 0, timeout=SECONDS) as connection:
        if server.scheme == "smtp" and connection.ehlo() and connection.has_extn("starttls"):
            connection.starttls()
        if server.username and server.password:
            connection.login(unquote(server.username), unquote(server.password))
        connection.send_message(mail)


HOOKS: dict[str, Any] = {
    "on_completion": [notify],
    "on_failure": [notify],
    "on_crashed": [notify],
    "on_cancellation": [notify],
}

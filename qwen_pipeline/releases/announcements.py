"""Messages to people about lines of the store's log: recalls, approvals, and moves of ``production``.

The command that appended a line sends its message at once. What could not be sent, and what other processes appended,
is sent by the sensor ``notifications``: both continue after the last line that was announced.
"""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from qwen_pipeline.checkpoint.store.follow import begin_following, follow
from qwen_pipeline.checkpoint.store.log import Entry
from qwen_pipeline.config import Settings
from qwen_pipeline.config.notify import Notify
from qwen_pipeline.errors import CheckpointRefused, EnvironmentFault, InputRefused
from qwen_pipeline.lineage.statements import RECALLED, Statement, reason_of, statements
from qwen_pipeline.notifications import Notification, send
from qwen_pipeline.releases.recall import impact

RECORD = "announced.json"
"""In the workspace: the number of the last line that was announced."""


def announce(settings: Settings, notify: Notify) -> list[str]:
    """Send a message about each line since the last one that was announced; return their titles.

    Lines that were in the log before the first call are not announced.

    Raises:
        EnvironmentFault: A message was not accepted; the next call sends it again.
        CheckpointRefused: The log has a line that cannot be read.
    """
    sent: list[str] = []
    for entry in follow(settings.store_root, settings.workspace / RECORD):
        message = _message(settings, entry)
        if message and message.event in notify.events:
            send(message, notify)
            sent.append(message.title)
    return sent


@contextmanager
def announced(settings: Settings) -> Generator[list[str]]:
    """Announce what the body appends to the log; the list that is yielded gets a line about each message."""
    lines: list[str] = []
    if not settings.notify.urls:
        yield lines
        return
    begin_following(settings.store_root, settings.workspace / RECORD)
    yield lines
    try:
        lines += [f"Sent: {title}" for title in announce(settings, settings.notify)]
    except (EnvironmentFault, CheckpointRefused) as fault:
        lines.append(f"Not sent yet; the sensor notifications tries again. {fault.what}")


def _message(settings: Settings, entry: Entry) -> Notification | None:
    if entry.event == RECALLED:
        title = f"{entry.path[:19]} was recalled: {reason_of(entry)}"
        return Notification(event="recalled", title=title, body=_impact(settings, entry.path))
    for statement in statements([entry]):
        if not statement.fault and statement.pointer in ("", "production"):
            return _of_statement(statement)
    return None


def _impact(settings: Settings, digest: str) -> str:
    try:
        found = impact(settings, digest)
    except InputRefused as refused:  # its descendants are in another store
        return f"{digest}\n\n{refused.what}"
    served = [f"{pointer}: {release}" for pointer, release in found.pointers.items()]
    return "\n".join([digest, found.sentence, *served, "qwen-pipeline audit descendants lists them."])


def _of_statement(stated: Statement) -> Notification:
    signed = f"signed with {stated.keyid[:16]}" if stated.keyid else "not signed"
    body = f"{stated.by}: {stated.reason}\n{stated.release} {stated.digest}\n{stated.time}, {signed}"
    if stated.pointer:
        before = f" (before: {Path(stated.before).name})" if stated.before else ""
        title = f"{stated.product}: {Path(stated.release).name} is in production{before}"
        return Notification(event="promoted", title=title, body=body)
    return Notification(
        event="approved", title=f"{stated.product}: {Path(stated.release).name} was {stated.event}", body=body
    )

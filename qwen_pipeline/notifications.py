"""Messages to people, sent by Apprise: to a webhook, a chat, e-mail or some hundred other services."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwen_pipeline.config.notify import Event, Notify
from qwen_pipeline.errors import EnvironmentFault, listed

_TYPES: Mapping[Event, str] = {
    "failed": "failure",
    **dict.fromkeys(("quarantined", "warned", "disk_low", "recalled"), "warning"),
    **dict.fromkeys(("released", "promoted"), "success"),
    "approved": "info",
}
_VARIABLE = re.compile(r"\$\{(\w+)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Notification:
    """One message.

    Attributes:
        title: One line: what happened to which fine-tune.
        body: Plain text: why, and what to do.
    """

    event: Event
    title: str
    body: str


def send(notification: Notification, notify: Notify) -> None:
    """Send a message to every configured address; those that can be reached get it even if others cannot.

    Raises:
        EnvironmentFault: An environment variable is not set, Apprise does not know a service, or an address cannot be
            reached or does not accept the message. Addresses are named by service and host, without their secrets.
    """
    from apprise import Apprise

    failed: list[str] = []
    for address in notify.urls:
        service = Apprise()
        if not service.add(_with_secrets(address)):
            raise EnvironmentFault(
                f"{_shown(address)} is not an address that Apprise knows.",
                remedy="Correct notify.urls; the services are at https://github.com/caronc/apprise/wiki.",
            )
        if not service.notify(notification.body, title=notification.title, notify_type=_TYPES[notification.event]):
            failed.append(service[0].url(privacy=True).partition("?")[0])
    if failed:
        raise EnvironmentFault(
            f"The notification {notification.title!r} was not accepted by {listed(failed)}.",
            remedy="Correct notify.urls and try it: qwen-pipeline notify.",
        )


def missing_secrets(notify: Notify) -> Sequence[str]:
    """Return the environment variables that the addresses name and that are not set."""
    return sorted({name for url in notify.urls for name in _VARIABLE.findall(url) if name not in os.environ})


def _with_secrets(address: str) -> str:
    def value(match: re.Match[str]) -> str:
        if (found := os.environ.get(match[1])) is None:
            raise EnvironmentFault(
                f"The environment variable {match[1]}, which notify.urls names, is not set.",
                remedy=f"Set {match[1]} where Dagster's daemon and code location run.",
            )
        return found

    return _VARIABLE.sub(value, address)


def _shown(address: str) -> str:
    """Return the service of an address, without what may be a secret."""
    return f"{address.partition('://')[0]}://..." if "://" in address else address

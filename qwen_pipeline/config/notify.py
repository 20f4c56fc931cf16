"""The section of notifications."""

import re
from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator

from qwen_pipeline.config.sections import Section

Event = Literal["failed", "quarantined", "warned", "released", "promoted", "approved", "recalled", "disk_low"]
"""A run failed or was cancelled; an upload is not taken; a run's checks warned; a release was made; production leads to
another release; a person approved or revoked one; an input or output was recalled; the store's disk is nearly full."""

_URL = re.compile(r"(\w|\$\{\w+\})[\w+.-]*://\S+|\$\{\w+\}")


class Notify(Section):
    """Notifications of events that need a person, sent while Dagster's daemon runs.

    Attributes:
        urls: Addresses in Apprise's form: ``jsons://host/path`` posts JSON to a webhook, ``slack://...``,
            ``mmosts://...`` (Mattermost), ``mailtos://...`` and many more. ``${NAME}`` is replaced by an environment
            variable when a message is sent, so that no secret is in this file.
        events: Events to send: ``failed`` and cancelled runs, uploads that are ``quarantined``, runs whose checks
            ``warned``, ``released`` checkpoints, moves of ``production`` (``promoted``), releases that were
            ``approved`` or revoked, what was ``recalled``, and ``disk_low``.
        min_free_gb: Free space on the disk of the store below which it is low, in GB.
        ui: Address of Dagster's UI, for links to runs.
    """

    urls: tuple[str, ...] = ()
    events: tuple[Event, ...] = get_args(Event)
    min_free_gb: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 50
    ui: str = "http://127.0.0.1:3000"

    @field_validator("urls")
    @classmethod
    def _require_addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not _URL.fullmatch(url):
                raise ValueError(f"{url!r} is no address such as jsons://host/path, slack://... or ${{NAME}}")
        return urls

"""``qwen-pipeline notify``: a message to every configured address, to try them."""

from typing import Annotated

import typer

from qwen_pipeline.cli.results import CommandResult, command
from qwen_pipeline.errors import InputRefused

app = typer.Typer()


@command(app, "notify", examples=["qwen-pipeline notify", 'qwen-pipeline notify "Maintenance at 18:00" --json'])
def notify(
    message: Annotated[
        str, typer.Argument(help="Text of the message.")
    ] = "Notifications of qwen_pipeline arrive here.",
) -> CommandResult:
    """Send MESSAGE to every address of the section [notify], to try them."""
    from qwen_pipeline.config import load_settings
    from qwen_pipeline.notifications import Notification, send

    section = load_settings().notify
    if not section.urls:
        raise InputRefused(
            "No address is configured.", remedy='Add to the settings: [notify] urls = ["jsons://host/path"].'
        )
    send(Notification(event="released", title="qwen_pipeline", body=message), section)
    return CommandResult(data={"addresses": len(section.urls)}, view=[f"Sent to {len(section.urls)} addresses."])

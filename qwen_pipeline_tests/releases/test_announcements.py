"""Messages about recalls, approvals and promotions: each is sent once, by the command or by the sensor."""

from collections.abc import Iterator
from typing import Any

import pytest

from qwen_pipeline.config import Settings
from qwen_pipeline.config.file import FILE_VARIABLE
from qwen_pipeline.errors import EnvironmentFault
from qwen_pipeline.lineage.verification.records import read_record
from qwen_pipeline.releases.announcements import announce
from qwen_pipeline.releases.promotion import advance, approve, rollback
from qwen_pipeline.releases.recall import recall
from qwen_pipeline_tests.cli.terminal import qwen_pipeline
from qwen_pipeline_tests.releases.released import PRODUCT, Released
from qwen_pipeline_tests.webhook import Webhook, webhook


@pytest.fixture
def hook() -> Iterator[Webhook]:
    with webhook() as listening:
        yield listening


def settings_with(released: Released, hook: Webhook, **sections: Any) -> Settings:
    return released.settings(notify={"urls": [f"json://127.0.0.1:{hook.port}/"]}, **sections)


def test_each_line_is_reported_once_and_again_if_sending_failed(released: Released, hook: Webhook) -> None:
    settings = settings_with(released, hook, signing={"key": released.key("release")})
    first = released.make(settings, 1)
    assert announce(settings, settings.notify) == []  # what was before is not told
    assert advance(settings, PRODUCT).moved
    second = released.make(settings, 2)
    approve(settings, PRODUCT, reason="read it", by="Ada")
    assert advance(settings, PRODUCT).moved
    rollback(settings, PRODUCT, reason="slow", by="Bob")
    recall(settings, str(first), reason="no licence", by="Eve")

    hook.status = 503
    with pytest.raises(EnvironmentFault, match="was not accepted"):
        announce(settings, settings.notify)
    hook.status = 200
    digest = read_record(first).step.content_digest
    assert announce(settings, settings.notify) == [
        f"{PRODUCT}: {first.name} is in production",
        f"{PRODUCT}: {second.name} was approved",
        f"{PRODUCT}: {second.name} is in production (before: {first.name})",
        f"{PRODUCT}: {second.name} was revoked",
        f"{PRODUCT}: {first.name} is in production (before: {second.name})",
        f"{digest[:19]} was recalled: no licence (Eve)",
    ]
    assert announce(settings, settings.notify) == []
    bodies = [post["message"] for _, post in hook.posts]
    assert bodies[1].startswith("Ada: read it\n")
    assert "signed with" in bodies[1]
    assert f"{PRODUCT}/production: published/{PRODUCT}/{first.name}" in bodies[-1]


def test_commands_send_at_once_and_leave_unsent_messages_to_the_sensor(
    released: Released, hook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    released.root.mkdir()
    file = released.root / "settings.toml"
    file.write_text(f'workspace = "."\n[notify]\nurls = ["json://127.0.0.1:{hook.port}/"]\n')
    monkeypatch.setenv(FILE_VARIABLE, str(file))
    settings = settings_with(released, hook)
    release = released.make(settings, 1)
    assert f"Sent: {PRODUCT}: {release.name} is in production" in qwen_pipeline("promote", PRODUCT).out
    hook.status = 500
    revoked = qwen_pipeline("approve", PRODUCT, "--revoke", "--reason", "wrong")
    assert (revoked.code, "Not sent yet" in revoked.out) == (0, True)
    hook.status = 200
    told = qwen_pipeline("audit", "recall", str(release), "--reason", "no licence", "--by", "Eve", "--json").data
    assert [line.partition(": ")[2].partition(" was ")[2] for line in told["told"]] == [
        "revoked",
        "recalled: no licence (Eve)",
    ]
    assert told["pointers"].keys() == {f"{PRODUCT}/candidate", f"{PRODUCT}/production"}
    assert len(hook.posts) == 3
    assert "no licence (Eve)" in qwen_pipeline("releases", PRODUCT).out

"""Messages to people, received by a real HTTP server."""

from collections.abc import Iterator

import dagster as dg
import pytest
from safetensors.torch import load_file, save_file

from qwen_pipeline.config.notify import Notify
from qwen_pipeline.definitions import code_location
from qwen_pipeline.defs.operations.notification_sensor import notification_sensor
from qwen_pipeline.defs.resources import configured_resources
from qwen_pipeline.errors import EnvironmentFault, InputRefused
from qwen_pipeline.notifications import Notification, send
from qwen_pipeline.runner.dagster_home import open_instance
from qwen_pipeline.runner.headless import materialize
from qwen_pipeline.status import fine_tune_statuses
from qwen_pipeline_tests.cli.terminal import qwen_pipeline
from qwen_pipeline_tests.site import FINE_TUNE, Site
from qwen_pipeline_tests.tiny import tiny_adapter
from qwen_pipeline_tests.webhook import Webhook, webhook

MESSAGE = Notification(event="failed", title="poet: the run failed", body="why")


@pytest.fixture
def hook() -> Iterator[Webhook]:
    with webhook() as listening:
        yield listening


def tick(site: Site, notify: Notify, cursor: str | None) -> tuple[str, str]:
    """Evaluate the sensor once; return its message and its cursor, which a fault leaves where it was sent to last."""
    with open_instance(site.settings) as instance:
        context = dg.build_sensor_context(
            instance, cursor, definitions=code_location(site.settings), resources=configured_resources(site.settings)
        )
        try:
            reason = notification_sensor(notify)(context)
        except EnvironmentFault as fault:
            return fault.what, str(context.cursor)
        assert isinstance(reason, dg.SkipReason)
        return reason.skip_message or "", str(context.cursor)


def test_a_webhook_and_a_chat_get_the_message(hook: Webhook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHAT_TOKEN", "a1b2c3d4e5f6g7h8i9j0k1l2")
    chat = f"mmost://127.0.0.1:{hook.port}/${{CHAT_TOKEN}}"
    send(MESSAGE, Notify(urls=(f"json://127.0.0.1:{hook.port}/runs", chat)))
    (path, post), (chat_path, chat_post) = hook.posts
    assert (path, post["title"], post["message"], post["type"]) == ("/runs", MESSAGE.title, "why", "failure")
    assert chat_path == "/hooks/a1b2c3d4e5f6g7h8i9j0k1l2"
    assert MESSAGE.title in chat_post["text"]


def test_a_fault_names_the_address_without_its_secret(hook: Webhook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASSWORD", "hunter2secret")
    hook.status = 500
    with pytest.raises(EnvironmentFault, match=r"not accepted by json://user:\*\*\*\*@127\.0\.0\.1") as refused:
        send(MESSAGE, Notify(urls=(f"json://user:${{PASSWORD}}@127.0.0.1:{hook.port}/",)))
    assert "hunter2secret" not in str(refused.value)
    with pytest.raises(EnvironmentFault, match=r"UNSET_TOKEN.*is not set"):
        send(MESSAGE, Notify(urls=("slack://${UNSET_TOKEN}/#models",)))
    with pytest.raises(EnvironmentFault, match=r"nosuchservice://\.\.\. is not an address"):
        send(MESSAGE, Notify(urls=("nosuchservice://hunter2secret",)))


def test_a_failed_run_is_reported_once_with_its_reason_and_again_if_sending_failed(site: Site, hook: Webhook) -> None:
    site.configure(f'\n[notify]\nurls = ["json://127.0.0.1:{hook.port}/"]\nmin_free_gb = 0\n')
    notify = site.settings.notify
    assert notification_sensor(notify).name in {sensor.name for sensor in code_location(site.settings).sensors or ()}
    _, cursor = tick(site, notify, None)
    weights = tiny_adapter(site.root / "base", site.inbox.root / FINE_TUNE) / "adapter_model.safetensors"
    save_file({name: tensor.zero_() for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    assert materialize(site.settings, FINE_TUNE).fault

    hook.status = 503
    message, cursor = tick(site, notify, cursor)
    assert "was not accepted" in message
    hook.status = 200
    message, cursor = tick(site, notify, cursor)
    assert message == f"Sent: {FINE_TUNE}: the run failed"
    assert tick(site, notify, cursor) == ("Nothing new.", cursor)
    ((_, post),) = hook.posts
    assert "merged_checkpoint: changes_the_base: " in post["message"]
    assert f"{notify.ui}/runs/" in post["message"]
    assert "Dependencies" not in post["message"]


def test_a_disk_that_is_nearly_full_is_reported_once_until_there_is_space(site: Site, hook: Webhook) -> None:
    full, roomy = (Notify(urls=(f"json://127.0.0.1:{hook.port}/",), min_free_gb=size) for size in (1e9, 0))
    cursor = None
    for notify in (full, full, roomy, full):
        _, cursor = tick(site, notify, cursor)
    assert [title.partition(" has ")[0] for title in hook.titles] == [f"The disk of {site.settings.store_root}"] * 2


def test_an_upload_that_is_quarantined_is_reported_once_with_its_reason(site: Site, hook: Webhook) -> None:
    notify = Notify(urls=(f"json://127.0.0.1:{hook.port}/",), min_free_gb=0)
    _, cursor = tick(site, notify, None)
    upload = site.inbox.root / FINE_TUNE
    upload.mkdir(parents=True)
    (upload / "checkpoint-1").mkdir()
    (upload / "checkpoint-1" / "config.json").touch()
    assert fine_tune_statuses(site.settings)[0].is_quarantined
    message, cursor = tick(site, notify, cursor)
    assert message == f"Sent: {FINE_TUNE}: not taken"
    assert tick(site, notify, cursor)[0] == "Nothing new."
    ((_, post),) = hook.posts
    assert "each checkpoint in it is a fine-tune of its own" in post["message"]
    assert f"{notify.ui}/assets/inbox" in post["message"]


def test_the_command_tries_every_address(site: Site, hook: Webhook) -> None:
    refused = qwen_pipeline("notify")
    assert refused.code == InputRefused.exit_code
    assert "No address" in refused.err
    site.configure(f'\n[notify]\nurls = ["json://127.0.0.1:{hook.port}/"]\n')
    assert qwen_pipeline("notify", "hello", "--json").data == {"addresses": 1}
    assert [post["message"] for _, post in hook.posts] == ["hello"]


def test_an_address_that_is_none_is_refused_when_settings_load(site: Site) -> None:
    site.configure('\n[notify]\nurls = ["hooks.example.org"]\n')
    with pytest.raises(InputRefused, match=r"notify\.urls"):
        _ = site.settings

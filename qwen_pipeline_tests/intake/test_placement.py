"""The base and the products of an upload, or the reason why it is quarantined, on two bases and two recipes."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qwen_pipeline.config import Settings
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.intake import record
from qwen_pipeline.intake.placement import Placement, base_of, place, settings_of_product
from qwen_pipeline.intake.record import open_intake
from qwen_pipeline.models.base_names import KnownBase
from qwen_pipeline.models.inbox import MARKER, Arrival
from qwen_pipeline_tests.several import ADAPTER_CONFIG, change, drop, drop_model, make_several
from qwen_pipeline_tests.site import Site


@pytest.fixture(scope="module")
def place_of_module(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return make_several(tmp_path_factory.mktemp("several") / "site")


@pytest.fixture
def site(place_of_module: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for name, value in place_of_module.environment.items():
        monkeypatch.setenv(name, value)
    yield place_of_module
    shutil.rmtree(place_of_module.root / "workspace", ignore_errors=True)


def judge(site: Site, upload: Path) -> Placement:
    return place(site.settings, site.inbox.find(upload.name))


def products(site: Site, upload: Path) -> tuple[str, tuple[str, ...]]:
    placement = judge(site, upload)
    assert placement.state == "placed", placement.reason
    return placement.base, placement.products


def test_an_adapter_gets_the_base_that_it_names_and_every_recipe_that_matches(site: Site) -> None:
    assert products(site, drop(site, "poet")) == ("small", ("poet",))
    assert products(site, drop(site, "tutor", "other")) == ("large", ("tutor",))
    assert products(site, drop(site, "chat-one")) == ("small", ("chat-one@wide",))
    assert products(site, drop(site, "both-small")) == ("small", ("both-small@wide",))
    assert products(site, drop(site, "both-large", "other")) == ("large", ("both-large@wide", "both-large@floats"))
    assert products(site, drop(site, "named", base_model_name_or_path="lab/small-v2")) == ("small", ("named",))


def test_a_whole_model_gets_the_base_with_its_sizes(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert products(site, drop_model(site, "whole")) == ("small", ("whole",))
    assert products(site, drop_model(site, "wholly", "other")) == ("large", ("wholly",))
    unknown = drop_model(site, "unknown", num_hidden_layers=9)
    assert "a model of hidden_size 64, num_hidden_layers 9" in judge(site, unknown).reason

    file = site.root / "qwen_pipeline.toml"
    text = file.read_text()
    twin = f'\n[bases.twin]\nmodel = "{site.root / "twin"}"\nmatch = ["twin-*"]\n'
    shutil.copytree(site.root / "base", site.root / "twin")
    file.write_text(text + twin)
    try:
        ambiguous = judge(site, site.inbox.root / "whole")
        assert (ambiguous.state, "fits several bases: small, twin" in ambiguous.reason) == ("quarantined", True)
        assert "match" in ambiguous.remedy
        assert products(site, drop_model(site, "twin-poet"))[0] == "twin"
        assert products(site, drop_model(site, "said", _name_or_path=str(site.root / "twin")))[0] == "twin"
        (site.inbox.root / "whole" / "README.md").write_text("---\nbase_model: base\nlicense: mit\n---\n# Whole\n")
        assert products(site, site.inbox.root / "whole")[0] == "small"
    finally:
        file.write_text(text)
        shutil.rmtree(site.root / "twin")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"base_model_name_or_path": "Qwen/Qwen9-7B"}, "an adapter of 'Qwen/Qwen9-7B', which is none of the bases"),
        ({"base_model_name_or_path": None}, "an adapter that names no base"),
        ({"base_model_name_or_path": "other", "revision": "fedcba9"}, "'other' at fedcba9"),
    ],
)
def test_an_unknown_base_is_named_with_the_known_ones(site: Site, config: dict[str, str], named: str) -> None:
    found = judge(site, drop(site, "lost", **config))
    assert found.state == "quarantined"
    assert named in found.reason
    assert "small (base), large (other at 0123456789abcdef)" in found.reason
    assert "[bases.NAME]" in found.remedy


def test_what_merge_refuses_by_its_headers_is_quarantined_with_the_same_reason(site: Site) -> None:
    narrow = drop(site, "narrow", "other", base_model_name_or_path="base")
    assert "q_proj" in judge(site, narrow).reason
    ignored = drop(site, "ignored")
    save_file(load_file(ignored / "adapter_model.safetensors"), ignored / "value_head.safetensors")
    (ignored / MARKER).touch()
    found = judge(site, ignored)
    assert (found.state, "value_head.safetensors" in found.reason) == ("quarantined", True)
    (ignored / ADAPTER_CONFIG).write_text("{")
    assert judge(site, ignored).state == "quarantined"


def test_an_upload_chooses_recipes_only_where_the_operator_allows_it(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = drop(site, "chat-two", "other")
    (upload / "recipe.toml").write_text('recipes = ["floats", "default"]\n')
    assert products(site, upload)[1] == ("chat-two@wide",)
    monkeypatch.setenv("QWEN_PIPELINE_UPLOADS_CHOOSE_RECIPES", "true")
    assert products(site, upload)[1] == ("chat-two@floats", "chat-two")
    for text, reason in (
        ('recipes = ["slow"]', "There is no recipe 'slow'. Known are default, wide, floats"),
        ("quantization = { bits = 8 }", "names no recipes: it has quantization"),
        ("recipes = [", "names no recipes"),
        ("recipes = [3]", "recipes is [3]"),
    ):
        (upload / "recipe.toml").write_text(text)
        found = judge(site, upload)
        assert (found.state, reason in found.reason) == ("quarantined", True), found.reason
    small = drop(site, "chat-three")
    (small / "recipe.toml").write_text('recipes = ["floats"]\n')
    assert "is for fine-tunes of the base 'large', not of 'small'" in judge(site, small).reason


def test_the_settings_of_a_product_are_those_of_its_base_and_recipe(site: Site) -> None:
    drop(site, "both-large", "other")
    floats = settings_of_product(site.settings, "both-large@floats")
    assert (floats.base_model, floats.base_revision) == ("other", "0123456789abcdef")
    assert (floats.quantization.method, floats.quantization.samples) == ("fp8-dynamic", 8)
    wide = settings_of_product(site.settings, "both-large@wide", overrides={"padding": {"tensor_parallel": 4}})
    assert (wide.padding.tensor_parallel, wide.quantization.group_size) == (4, 32)
    with pytest.raises(InputRefused, match=r"no recipe 'wid'\. Did you mean wide\?"):
        settings_of_product(site.settings, "both-large@wid")
    with pytest.raises(InputRefused, match="'gone' is not in"):
        base_of(site.settings, "gone")


def test_an_upload_is_judged_once_until_its_files_or_the_rules_change(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[str] = []

    def counted(settings: Settings, arrival: Arrival, bases: Mapping[str, KnownBase] | None) -> Placement:
        judged.append(arrival.name)
        return place(settings, arrival, bases)

    monkeypatch.setattr(record, "place", counted)

    def look() -> list[str]:
        judged.clear()
        with open_intake(site.settings) as intake:
            for arrival in site.inbox.arrivals():
                intake.judge(arrival)
            return sorted(intake.quarantined)

    upload = drop(site, "lost", base_model_name_or_path="Qwen/Lost")
    drop(site, "poet")
    assert (look(), judged) == (["lost"], ["lost", "poet"])
    assert (look(), judged) == (["lost"], [])
    change(upload, ADAPTER_CONFIG, base_model_name_or_path="lab/small-1")
    assert (look(), judged) == ([], ["lost"])
    monkeypatch.setenv("QWEN_PIPELINE_LEAVE_BEHIND", '["*.bin"]')
    assert (look(), judged) == ([], ["lost", "poet"])
    (site.root / "workspace" / "intake.json").write_text("damaged")
    assert (look(), judged) == ([], ["lost", "poet"])


def test_an_upload_that_is_marked_complete_and_is_not_is_quarantined_at_once(site: Site) -> None:
    weights = drop(site, "cut") / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    for is_marked, state in ((False, "incomplete"), (True, "quarantined")):
        if is_marked:
            (weights.parent / MARKER).touch()
        placement = place(site.settings, site.inbox.find("cut"))
        assert (placement.state, "adapter_model.safetensors" in placement.reason) == (state, True)


def test_an_upload_that_stays_incomplete_is_quarantined(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = drop(site, "stopped")
    (upload / MARKER).unlink()
    (upload / "adapter_model.safetensors").rename(upload / "adapter_model.safetensors.part")
    now = record.time.time()
    for seconds, names in ((0, []), (record.INCOMPLETE_SECONDS + 1, ["stopped"])):
        monkeypatch.setattr(record.time, "time", lambda seconds=seconds: now + seconds)
        with open_intake(site.settings) as intake:
            assert "still being written" in intake.judge(site.inbox.find("stopped")).placement.reason
            assert sorted(intake.quarantined) == names

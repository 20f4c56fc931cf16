"""The recipes of a fine-tune share its outputs, and each has a history of its own."""

from pathlib import Path

from qwen_pipeline.checkpoint.store.derive import derive
from qwen_pipeline.checkpoint.store.destinations import CheckpointStore
from qwen_pipeline.checkpoint.store.products import Product, product
from qwen_pipeline_tests.checkpoint.copies import note, write_note


def test_a_key_names_fine_tune_and_recipe() -> None:
    assert product("poet") == product("poet@default") == Product("poet")
    assert product("poet@fast") == Product("poet", "fast")
    assert (product("poet@fast").key, product("poet").key, product("poet").mark) == ("poet@fast", "poet", "@default")


def test_recipes_share_outputs_and_have_links_and_histories_of_their_own(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    first = derive(note("one"), store.slot("poet"), write_note)
    assert sorted(path.name for path in first.path.parent.iterdir() if path.is_symlink()) == ["latest"]

    shared = derive(note("one"), store.slot("poet@fast"), write_note)
    assert (shared.reused, shared.path) == (True, first.path)
    assert [store.finished("note", key)[0].path for key in ("poet", "poet@fast")] == [first.path, first.path]

    fast = derive(note("two"), store.slot("poet@fast"), write_note)
    assert store.require_latest("note", "poet").path == first.path
    assert store.require_latest("note", "poet@fast").path == fast.path
    assert [each.path for each in store.finished("note", "poet")] == [first.path]
    assert {each.path for each in store.finished("note", "poet@fast")} == {first.path, fast.path}
    assert store.finished("note", "poet@best") == []
    assert store.latest("note", "poet@best") is None

    derive(note("two"), store.slot("poet"), write_note)
    assert {each.path for each in store.finished("note", "poet")} == {first.path, fast.path}
    assert store.products(["note"]) == store.products(["note"], "poet") == {Product("poet"), Product("poet", "fast")}
    assert store.products(["note"], "other") == set()


def test_an_output_that_another_recipe_made_first_is_not_the_default_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    fast = derive(note("one"), store.slot("poet@fast"), write_note)
    assert store.finished("note", "poet") == []
    assert store.products(["note"]) == {Product("poet", "fast")}
    derive(note("one"), store.slot("poet@best"), write_note)
    assert store.finished("note", "poet") == []
    derive(note("one"), store.slot("poet"), write_note)
    assert [each.path for each in store.finished("note", "poet")] == [fast.path]

"""The placement of an upload: its base and its products, or the reason why it is not taken.

Only headers and configs are read, so that a sensor can judge an upload of any size. An upload that its run would refuse
is quarantined instead, with the same reason, and judged again when it or the settings change.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qwen_pipeline.checkpoint.store.canonical import canonical_sha256
from qwen_pipeline.checkpoint.store.destinations import CheckpointStore
from qwen_pipeline.checkpoint.store.products import product
from qwen_pipeline.config import Settings, settings_of
from qwen_pipeline.errors import InputRefused, PipelineError
from qwen_pipeline.intake.bases import ONLY, base_of_merged, choose_base, known_bases
from qwen_pipeline.intake.recipes import products_of
from qwen_pipeline.models.base_names import KnownBase
from qwen_pipeline.models.examine import require_mergeable
from qwen_pipeline.models.inbox import Arrival, Inbox
from qwen_pipeline.stages import merge, repair

State = Literal["incomplete", "quarantined", "placed"]
Inflow = Literal["fine_tunes", "imports"]
"""Kind of the uploads: fine-tunes in the inbox, or checkpoints that were quantized elsewhere."""
VERSION = 3
"""Raised when uploads that were judged before have to be judged again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The judgement on one upload.

    Attributes:
        state: ``incomplete``: a part of it may still arrive. ``quarantined``: it cannot be taken as it is.
            ``placed``: it has a base and products.
        reason: Why it is not placed.
        remedy: What to do about it.
        base: The name of its base; empty if the settings have one base without a name.
        products: The keys of its products.
        is_final: False if the machine was at fault, so that it is judged again though nothing changed.
    """

    state: State
    reason: str = ""
    remedy: str = ""
    base: str = ONLY
    products: tuple[str, ...] = ()
    is_final: bool = True


def place(settings: Settings, arrival: Arrival, bases: Mapping[str, KnownBase] | None = None) -> Placement:
    """Judge an upload. An error of any kind is a reason too, so that one upload never blocks the others.

    Args:
        settings: All settings.
        arrival: The upload.
        bases: The :func:`known_bases` of the settings, if they are known already.
    """
    return _judge(arrival, lambda: _place(settings, arrival, bases or known_bases(settings)))


def place_import(settings: Settings, arrival: Arrival) -> Placement:
    """Judge a quantized checkpoint among the imports: from its headers alone, as its repair would."""

    def placed() -> Placement:
        repair.plan(arrival.path, tensor_parallel=settings.padding_spec.ranks)
        return Placement(state="placed", products=(arrival.name,))

    return _judge(arrival, placed)


def _judge(arrival: Arrival, placed: Callable[[], Placement]) -> Placement:
    """Return the placement of a complete upload, or the reason why it has none."""
    if obstacle := arrival.find_obstacle():
        may_arrive = obstacle.is_incomplete and not arrival.is_marked_complete
        state: State = "incomplete" if may_arrive else "quarantined"
        return Placement(state=state, reason=obstacle.reason, remedy=obstacle.remedy)
    try:
        return placed()
    except PipelineError as fault:
        state = "incomplete" if fault.retryable else "quarantined"
        return Placement(state=state, reason=fault.what, remedy=fault.remedy, is_final=not fault.retryable)
    except OSError as error:
        reason = f"It cannot be read: {error}."
        return Placement(state="incomplete", reason=reason, remedy="Complete the upload.", is_final=False)
    except Exception as error:
        reason = f"It cannot be judged: {type(error).__name__}: {error}"
        return Placement(state="quarantined", reason=reason, remedy="Report this with: qwen-pipeline inspect --debug.")


def _place(settings: Settings, arrival: Arrival, bases: Mapping[str, KnownBase]) -> Placement:
    base = choose_base(settings, arrival.name, arrival.path, bases)
    products = products_of(settings, arrival.name, base=base, root=arrival.path)
    overlays = [settings.recipes[each.recipe].overlay if each.recipe else {} for each in products]
    for patterns in {overlay.get("leave_behind", settings.leave_behind) for overlay in overlays}:
        require_mergeable(arrival.path, bases[base], patterns)
    return Placement(state="placed", base=base, products=tuple(each.key for each in products))


def rules_digest(settings: Settings, of: Inflow = "fine_tunes") -> str:
    """Return a digest of the settings that placements depend on."""
    if of == "imports":
        return canonical_sha256([VERSION, settings.padding_spec.ranks])[:16]
    of_base = {name: value for name, value in settings.model_dump(mode="json").items() if name in _RULES}
    return canonical_sha256([VERSION, of_base])[:16]


_RULES = (
    "base_model", "base_revision", "base_names", "base_dequantize", "base_nf4", "text_only", "leave_behind", "bases",
    "recipes", "default_recipes", "uploads_choose_recipes",
)  # fmt: skip


def base_of(settings: Settings, fine_tune: str) -> str:
    """Return the name of the base of a fine-tune that is in the inbox, or of which the store has a merged checkpoint.

    Raises:
        InputRefused: It fits none of the bases, or several.
    """
    if len(settings.bases) <= 1:
        return next(iter(settings.bases), ONLY)
    arrival = Arrival(fine_tune, Inbox(settings.inbox).root / fine_tune)
    if arrival.path.is_dir():
        return choose_base(settings, fine_tune, arrival.path)
    store = CheckpointStore(settings.store_root)
    merged = [store.latest(merge.STAGE, each.key) for each in store.products([merge.STAGE], fine_tune)]
    found = next((base_of_merged(settings, each.manifest) for each in merged if each), None)
    if found is None:
        raise InputRefused(
            f"{fine_tune!r} is not in {settings.inbox}, and none of the bases in the settings is known to be its.",
            remedy=f"Copy it to {arrival.path}.",
        )
    return found


def settings_of_product(settings: Settings, key: str, *, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Return the settings of a product by its key: those of its base and its recipe.

    Args:
        settings: All settings.
        key: ``<fine-tune>`` or ``<fine-tune>@<recipe>``.
        overrides: Values that go before those of the recipe.

    Raises:
        InputRefused: There is no such recipe, or the fine-tune fits none of the bases, or several.
    """
    named = product(key)
    return settings_of(settings, named.recipe, base=base_of(settings, named.fine_tune) or None, overrides=overrides)

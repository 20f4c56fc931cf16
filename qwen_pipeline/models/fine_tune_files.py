"""The fate of each file of a fine-tune: read, carried over, left behind for a known reason, or refused.

Weights that were trained beside a LoRA lie in files that only their trainer reads: ``vit.safetensors`` (ms-swift#9187),
``non_lora_state_dict.bin`` (DeepSpeed#7429), a value head, a dense layer of Sentence Transformers. A merge that ignored
them would give another model than the one that was trained, so such a file is refused unless it is left behind by name.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from shlex import quote
from typing import Any, cast

from qwen_pipeline.checkpoint.lazy import CONFIG, INDEX, MANIFEST, PICKLES, Checkpoint, relative_files
from qwen_pipeline.checkpoint.trainers.state_dicts import NON_LORA
from qwen_pipeline.errors import InputRefused, listed
from qwen_pipeline.reports import CheckReport, CheckSpec
from qwen_pipeline.transforms.lora.adapter import ADAPTER_CONFIG, Adapter
from qwen_pipeline.transforms.lora.adapter_set import ADAPTER_SET, AdapterSet
from qwen_pipeline.transforms.lora.saved.weights import ADAPTER_WEIGHTS, weight_files

FILES_READ = CheckSpec(
    name="no_weights_are_ignored",
    description="Every file of the fine-tune with weights is read, or was left behind on request.",
)
_PLAIN = re.compile(r"[\w./-]+")
"""A path that has no meaning of its own in a command."""
_REQUESTED = "on request"
_LISTED = 3
_STATE, _EARLIER, _LOGS = "state for resuming the training", "an earlier checkpoint", "logs of the training"
_DOCUMENT, _CODE, _OTHER_FORMAT = "a document", "code, which is never run", "the same weights in another format"
KNOWN: Mapping[str, Sequence[str]] = {
    _EARLIER: ("checkpoint-*/*", "ckpt-*/*"),
    _STATE: (
        "optimizer*.pt", "optimizer*.bin", "optimizer_*/*", "optim_world_size_*.pt", "scheduler.pt", "scheduler.bin",
        "scaler.pt", "rng_state*.pth", "random_states_*.pkl", "training_args.bin", "sampler*.bin", "dataloader*.pt",
        "extra_state_world_size_*.pt", "global_step*/*", "latest", "trainer_state.json",
    ),
    _LOGS: ("runs/*", "logs/*", "wandb/*", "tensorboard/*", "*tfevents*", "*.log", "*.jsonl", "*.png", "*.csv"),
    _DOCUMENT: ("*.md", "*.txt", "*.json", "*.yaml", "*.yml", "*.toml", "*.html", "*.pdf", "*.jinja"),
    _CODE: ("*.py",),
}  # fmt: skip
"""Files that are left behind: what they are -> patterns of their paths."""
OTHER_FORMATS = ("pytorch_model*.bin", "*.gguf", "*.h5", "*.msgpack", "onnx/*", "openvino/*")
"""Weights beside those of a whole model that are copies of them."""
WEIGHTS = ("*.safetensors", *PICKLES, "*.npz", "*.npy", "*.gguf", "*.h5", "*.msgpack", "*.distcp", "*.nemo")


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuneFiles:
    """The files of one directory of a fine-tune, by their relative paths.

    Attributes:
        root: The directory.
        read: Weights and settings.
        carried: Files that the merged checkpoint gets, unless the base keeps its own.
        left_behind: File -> what it is.
        unread: Files with weights that a merge does not read.
    """

    root: Path
    read: Sequence[str]
    carried: Sequence[str]
    left_behind: Mapping[str, str]
    unread: Sequence[str]


def files_of(
    root: Path | None, child: AdapterSet | Checkpoint, leave_behind: Collection[str] = ()
) -> list[FineTuneFiles]:
    """Return the files of a fine-tune, by directory.

    Args:
        root: The fine-tune's directory; None for adapters that were given one by one.
        child: The opened fine-tune.
        leave_behind: Patterns of paths of weights that are left behind on request.
    """
    if isinstance(child, Checkpoint):
        assert root
        read = [CONFIG, INDEX, MANIFEST, *child.shards.values()]
        return [_sorted_out(root, read, child.sidecars, leave_behind, is_whole=True)]
    members = {adapter.root: adapter for adapter in child.adapters}
    found = [_files_of_adapter(adapter, leave_behind) for adapter in members.values()]
    if root and root not in members:
        inside = [path for path in relative_files(root) if any((root / path).is_relative_to(each) for each in members)]
        found.insert(0, _sorted_out(root, [ADAPTER_SET, *inside], {}, leave_behind))
    return found


def _files_of_adapter(adapter: Adapter, leave_behind: Collection[str]) -> FineTuneFiles:
    return _sorted_out(adapter.root, [ADAPTER_CONFIG, *weight_files(adapter.root)], adapter.sidecars, leave_behind)


def _sorted_out(
    root: Path,
    read: Iterable[str],
    carried: Mapping[str, Path],
    leave_behind: Collection[str],
    *,
    is_whole: bool = False,
) -> FineTuneFiles:
    read, left, unread = set(read), dict[str, str](), list[str]()
    paths = relative_files(root)
    for path in (path for path in paths if path not in read and path not in carried):
        reason = _reason(path, leave_behind, is_whole=is_whole)
        if reason:
            left[path] = reason
        else:
            unread.append(path)
    return FineTuneFiles(
        root=root,
        read=[path for path in paths if path in read],
        carried=list(carried),
        left_behind=left,
        unread=unread,
    )


def _reason(path: str, leave_behind: Collection[str], *, is_whole: bool) -> str | None:
    """Return the reason why a file may be left behind; None if it holds weights."""
    if _matches(path, leave_behind):
        return _REQUESTED
    if reason := next((reason for reason, patterns in KNOWN.items() if _matches(path, patterns)), None):
        return reason
    if is_whole and _matches(path, OTHER_FORMATS):
        return _OTHER_FORMAT
    return None if _matches(path, WEIGHTS) else "not weights"


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)


def require_all_weights_read(files: Sequence[FineTuneFiles]) -> None:
    """Require that no file with weights is ignored.

    Raises:
        InputRefused: A file with weights is neither read nor known to be something else; the message names it.
    """
    for directory in files:
        if directory.unread:
            raise InputRefused(
                f"{directory.root} has weights that a merge does not read: {listed(directory.unread)}.",
                remedy=_remedy(directory),
            )


def require_no_code_of_its_own(child: AdapterSet | Checkpoint) -> None:
    """Require that a whole model is computed by Transformers' own class.

    Raises:
        InputRefused: Its config names another class, in a file that comes with it.
    """
    classes = child.config.get("auto_map") if isinstance(child, Checkpoint) else None
    codes = cast("Mapping[str, Any]", classes) if isinstance(classes, Mapping) else {}
    named = [f"{name}: {code}" for name, code in codes.items() if name.startswith("AutoModel")]
    if named:
        raise InputRefused(
            f"The config's auto_map names code of the model's own ({listed(named)}), which is never run here.",
            remedy="If Transformers' own class computes the same, remove auto_map from config.json. A model that"
            " computes something else, such as attention in both directions, cannot be processed.",
        )


def _remedy(files: FineTuneFiles) -> str:
    first = files.unread[0]
    leave = f"--leave-behind {quote(first)} (or the setting leave_behind)"
    if Path(first).name.startswith("adapter_model"):
        return f"If they are another copy of the adapter, or another adapter, pass {leave}."
    is_loaded = first.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt"))
    if not {ADAPTER_CONFIG, ADAPTER_WEIGHTS} <= {*files.read} or not is_loaded or not _PLAIN.fullmatch(first):
        return f"If its weights were not trained, pass {leave}. Otherwise put them into the model itself."
    if first == NON_LORA:
        convert = f"qwen-pipeline convert --from {quote(str(files.root))} --out CONVERTED"
        return f"Make them a part of the adapter: {convert}\nIf they were not trained, pass {leave}."
    load = f"load_file('{first}')" if first.endswith(".safetensors") else f"torch.load('{first}', weights_only=True)"
    add = (
        "import json, torch; from safetensors.torch import load_file, save_file; "
        f"p, c = '{'base_model.model.'}', json.load(open('{ADAPTER_CONFIG}')); "
        f"v = {{n.removeprefix(p): t for n, t in {load}.items()}}; "
        f"save_file(load_file('{ADAPTER_WEIGHTS}') | {{p + n: t.contiguous() for n, t in v.items()}},"
        f" '{ADAPTER_WEIGHTS}'); "
        "c['modules_to_save'] = sorted({*(c.get('modules_to_save') or []), *(n.rpartition('.')[0] for n in v)}); "
        f"json.dump(c, open('{ADAPTER_CONFIG}', 'w'))"
    )
    return (
        f"If they were trained as whole weights, make them a part of the adapter, as PEFT's modules_to_save: cd"
        f' {quote(str(files.root))} && python -c "{add}" && rm {quote(first)}\nIf they were not trained, pass {leave}.'
    )


def files_report(files: Sequence[FineTuneFiles], leave_behind: Collection[str]) -> CheckReport:
    """Report on :data:`FILES_READ`, after :func:`require_all_weights_read`."""
    left = [(path, reason) for directory in files for path, reason in directory.left_behind.items()]
    asked = [path for path, _ in left if _matches(path, leave_behind)]
    reasons = {reason: [path for path, why in left if why == reason] for _, reason in left}
    groups = [f"{reason}: {listed(paths, limit=_LISTED)}" for reason, paths in reasons.items() if reason != _REQUESTED]
    groups = [f"{_REQUESTED}: {', '.join(asked)}", *groups] if asked else groups
    return FILES_READ.report(
        passed=True,
        measured=f"{len(asked)} left behind on request" if asked else None,
        detail=f"{sum(len(each.read) for each in files)} files were read"
        + (f"; left behind: {' - '.join(groups)}." if groups else "."),
    )

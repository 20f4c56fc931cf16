"""The examination of a fine-tune by its headers and configs: it finds what merge refuses before any weight is read."""

from collections.abc import Collection
from pathlib import Path

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.models.base_names import KnownBase
from qwen_pipeline.models.changes import require_effect
from qwen_pipeline.models.fine_tune_files import files_of, require_all_weights_read, require_no_code_of_its_own
from qwen_pipeline.models.open import has_weights, open_fine_tune, paddings_of
from qwen_pipeline.qwen.config import require_full_precision
from qwen_pipeline.qwen.settle import settle
from qwen_pipeline.transforms.fine_tune.adopt import adopt
from qwen_pipeline.transforms.lora.adapter_set import AdapterSet
from qwen_pipeline.transforms.lora.merge import merge_lora
from qwen_pipeline.transforms.sidecars import with_sidecars
from qwen_pipeline.transforms.tokenizer_fits import require_tokenizer_fits


def require_full_precision_model(child: Checkpoint) -> None:
    """Require that a whole model has the weights of a full-precision fine-tune, and no code of its own.

    Raises:
        InputRefused: It is quantized, or its config names code that comes with it.
    """
    require_no_code_of_its_own(child)
    require_full_precision(
        child,
        because="Padding and quantization need the full-precision weights of a fine-tune.",
        remedy="Provide the model as it was saved before quantization.",
    )


def require_mergeable(root: Path, base: KnownBase, leave_behind: Collection[str] = ()) -> None:
    """Require that a fine-tune can be merged into a base, as far as headers and configs tell.

    Of a base that is not on this machine only the name is known; the weights then are not compared.

    Raises:
        PipelineError: The first refusal, as by merge.
    """
    child = open_fine_tune(root)
    require_all_weights_read(files_of(root, child, leave_behind))
    if isinstance(child, AdapterSet):
        require_effect(child, read_values=False)
    else:
        require_full_precision_model(child)
    if has_weights(base.root):
        _require_fitting(child, base)


def _require_fitting(child: AdapterSet | Checkpoint, base: KnownBase) -> None:
    parent = settle(base.weights.of(open_checkpoint(base.root)), reads_values=False).checkpoint
    if isinstance(child, AdapterSet):
        merged = merge_lora(parent, child, paddings=paddings_of(base.root, child), check_values=False).checkpoint
    else:
        merged = adopt(parent, child).checkpoint
    output = base.weights.kept(merged)
    require_tokenizer_fits(with_sidecars(output, parent, child.sidecars, text_only=base.weights.text_only))

"""Full fine-tunes: the check that one belongs to a base."""

from collections.abc import Sequence

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import CheckpointRefused, listed
from qwen_pipeline.qwen.config import require_full_precision
from qwen_pipeline.qwen.families import config_values, is_tied
from qwen_pipeline.transforms.lora.vocabulary import vocabulary_of


def require_fine_tune_of(base: Checkpoint, fine_tune: Checkpoint) -> Checkpoint:
    """Return a full fine-tune unchanged after checking that it is a fine-tune of ``base``.

    A tied output head may be stored in only one of them. The vocabulary may have another size, if embedding, head and
    config agree.

    Raises:
        QuantizedInputRefused: The fine-tune is quantized.
        CheckpointRefused: A tensor is missing, is not in the base or has another shape; the message names it.
    """
    require_full_precision(
        fine_tune,
        because="Padding and quantization need the full-precision weights of a fine-tune.",
        remedy="Provide the model as it was saved before quantization.",
    )
    tied = {"lm_head.weight"} if is_tied(base) and is_tied(fine_tune) else set[str]()
    model_types = [str(checkpoint.config.get("model_type")) for checkpoint in (base, fine_tune)]
    wrong = []
    if model_types[0] != model_types[1]:
        wrong = [f"its model_type is {model_types[1]}, but the base's is {model_types[0]}"]
    wrong += [f"{name} is missing" for name in base if name not in fine_tune and name not in tied]
    wrong += [f"{name} is not in the base" for name in fine_tune if name not in base and name not in tied]
    if not wrong:
        reshaped = [name for name, spec in base.items() if name in fine_tune and fine_tune[name].shape != spec.shape]
        resized = _resized_vocabulary(base, fine_tune) if reshaped else ()
        wrong = [
            f"{name} is {list(fine_tune[name].shape)}, but {list(base[name].shape)} in the base"
            for name in reshaped
            if name not in resized
        ]
    if wrong:
        raise CheckpointRefused(
            f"The full fine-tune does not match this base: {listed(wrong)}.",
            remedy="Use the base that the model was trained from, and provide all shards of the fine-tune. If the"
            " vocabulary was resized, the rows of embedding and head must both equal vocab_size.",
        )
    return fine_tune


def _resized_vocabulary(base: Checkpoint, fine_tune: Checkpoint) -> Sequence[str]:
    """Return embedding and head if they differ from the base's in their rows only, and have ``vocab_size`` of them."""
    names = [name for name in vocabulary_of(fine_tune).names if name in fine_tune]
    shapes = [fine_tune[name].shape for name in names]
    same_rows = {rows for rows, *_ in shapes} == config_values(fine_tune.config, "vocab_size")
    same_width = {shape[1:] for shape in shapes} == {base[name].shape[1:] for name in names if name in base}
    return names if same_rows and same_width else ()

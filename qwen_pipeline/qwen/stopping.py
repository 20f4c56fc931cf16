"""Which tokens end a model's answer, as Transformers' ``generate`` has it."""

import json

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.qwen.families import text_config

GENERATION_CONFIG = "generation_config.json"


def stop_tokens(checkpoint: Checkpoint) -> frozenset[int]:
    """Return the ``eos_token_id`` of ``generation_config.json``, one or several; without the file, of ``config.json``.

    A generation config that names none stops nowhere, whatever ``config.json`` says.
    """
    if file := checkpoint.sidecars.get(GENERATION_CONFIG):
        ids = json.loads(file.read_text()).get("eos_token_id")
    else:
        ids = checkpoint.config.get("eos_token_id", text_config(checkpoint.config).get("eos_token_id"))
    return frozenset([] if ids is None else [ids] if isinstance(ids, int) else ids)

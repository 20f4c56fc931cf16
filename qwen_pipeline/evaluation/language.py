"""The worker that measures what checkpoints say. Runs under an engine's python.

Whether a checkpoint is whole is asked of plain Transformers from headers alone; what it answers, of the same with one
model in memory at a time.
Perplexity and divergence come from the streamed forward, which needs no more memory than a layer.
"""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.errors import EnvironmentFault
from qwen_pipeline.evaluation.cuts import diverge
from qwen_pipeline.evaluation.figures import ModelFigures, dump_figures
from qwen_pipeline.evaluation.findings import QUANTIZED
from qwen_pipeline.evaluation.loading import complaints_of, fault_of, loading_options, place_tensors
from qwen_pipeline.evaluation.measurement import Measurement, cut_role
from qwen_pipeline.evaluation.streamed import activation_peaks, evaluate
from qwen_pipeline.layerwise.forward import Place
from qwen_pipeline.progress import Observe, Progress
from qwen_pipeline.transforms.model import is_recipe, open_model


class NotLoaded(Exception):
    """Transformers cannot load a checkpoint, or not all of it."""


def measure(spec: Mapping[str, Any], observe: Observe) -> dict[str, Any]:
    """Run a :class:`Measurement`; return role -> :class:`ModelFigures`, both as JSON values.

    Raises:
        EnvironmentFault: This environment lacks what Transformers needs to load GPTQ.
    """
    _require_loaders()
    asked = Measurement.from_json(spec)
    place = Place(device=torch.device(asked.device), dtype=torch.float32)
    loaded = {role: _loaded(role, root, asked, observe) for role, root in asked.models.items()}
    whole = {role: open_model(Path(asked.models[role])) for role, figures in loaded.items() if not figures.fault}
    if asked.reference in whole:
        measured = evaluate(
            whole,
            [torch.tensor(window) for window in asked.windows],
            reference=asked.reference,
            compared=[role for role in asked.compared if role in whole],
            place=place,
            observe=observe,
        )
        loaded |= {
            role: replace(
                figures, unplaced=loaded[role].unplaced, linears=loaded[role].linears, answers=loaded[role].answers
            )
            for role, figures in measured.items()
        }
    if asked.calibration and QUANTIZED in whole:
        heard = list(map(torch.tensor, asked.calibration))
        peaks = activation_peaks(whole[QUANTIZED], heard, place, observe=observe)
        loaded[QUANTIZED] = replace(loaded[QUANTIZED], calibration_peaks=peaks)
    if asked.cuts and not loaded[QUANTIZED].fault:
        loaded |= _on_ranks(asked, place)
    return dump_figures(loaded)


def _on_ranks(asked: Measurement, place: Place) -> dict[str, ModelFigures]:
    window = torch.tensor(asked.windows[0])
    figures = diverge(open_checkpoint(Path(asked.models[QUANTIZED])), asked.cuts, [window], place)
    return {cut_role(number): found for number, found in enumerate(figures)}


def _loaded(role: str, root: str, asked: Measurement, observe: Observe) -> ModelFigures:
    """Have Transformers place a model's tensors and, where it is asked to, load it and answer."""
    observe(Progress(task=f"load {role}", done=0, total=1))
    placement = place_tensors(Path(root))
    figures = ModelFigures(fault=placement.fault, unplaced=placement.unplaced, linears=placement.linears)
    prompts = asked.prompts if role in asked.answering and not (placement.fault or placement.unplaced) else ()
    observe(Progress(task=f"load {role}", done=1, total=len(prompts) + 1))
    return replace(figures, **_answers(role, root, prompts, asked, observe)) if prompts else figures


def _answers(
    role: str, root: str, prompts: Sequence[Sequence[int]], asked: Measurement, observe: Observe
) -> dict[str, Any]:
    try:
        model = load_model(root)
    except NotLoaded as fault:
        return {"fault": str(fault)}
    answers: list[tuple[int, ...]] = []
    for prompt in prompts:
        observe(Progress(task=f"load {role}", done=1 + len(answers), total=len(prompts) + 1, remark="answers"))
        answers.append(greedy_answer(model, prompt, max_new_tokens=asked.max_new_tokens))
    observe(Progress(task=f"load {role}", done=len(prompts) + 1, total=len(prompts) + 1))
    del model
    gc.collect()
    return {"answers": tuple(answers)}


def load_model(root: str) -> nn.Module:
    """Load a checkpoint as a user of Transformers does, on the CPU in float32, and account for every tensor.

    Weights that are a recipe are computed and handed over: nothing is stored.

    Raises:
        NotLoaded: Transformers raised, or loaded something else than the checkpoint: it gives missing weights random
            values and drops unexpected ones, and only logs that.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(root, local_files_only=True)
        load = _from_recipe if is_recipe(Path(root)) else _from_files
        model, info = load(root, config, **loading_options(config, device="cpu"))
    except MemoryError:
        raise
    except Exception as error:
        raise NotLoaded(fault_of(error)) from error
    if complaints := complaints_of(info):
        raise NotLoaded(complaints)
    return model.eval()


def _from_files(root: str, config: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    return _architecture(config).from_pretrained(root, local_files_only=True, use_safetensors=True, **options)


def _architecture(config: Any) -> Any:
    import transformers

    return getattr(transformers, config.architectures[0])


def _from_recipe(root: str, config: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    from transformers import GenerationConfig

    merged = open_model(Path(root))
    weights = {name: merged.load(name) for name in merged}
    model, info = _architecture(config).from_pretrained(None, config=config, state_dict=weights, **options)
    if "generation_config.json" in merged.sidecars:
        model.generation_config = GenerationConfig.from_pretrained(root, local_files_only=True)
    return model, info


def greedy_answer(model: Any, prompt: Sequence[int], *, max_new_tokens: int) -> tuple[int, ...]:
    """Return the tokens that the model finds most likely after a prompt, to its end-of-text token or the limit."""
    from transformers import GenerationConfig

    own, tokens = model.generation_config, torch.tensor([prompt])
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    output = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=greedy)
    return tuple(output[0, len(prompt) :].tolist())


def _require_loaders() -> None:
    try:
        import gptqmodel  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
        import optimum.gptq  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
    except ImportError as error:
        raise EnvironmentFault(
            f"This environment cannot load GPTQ checkpoints: {error}.",
            remedy="Install the engine: qwen-pipeline engine install gptqmodel",
        ) from error

"""The worker that loads checkpoints with plain Transformers and measures what they say. Runs under an engine's python.

One model is in memory at a time. To compare others with the reference, its last hidden states (float32 [T, H] a window)
and its output head are kept: together they give its logits again, without logits over the vocabulary being stored.
"""

import gc
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from qwen_pipeline.errors import EnvironmentFault
from qwen_pipeline.evaluation.divergence import Divergence, token_divergence, token_nll
from qwen_pipeline.evaluation.figures import DivergenceFigures, ModelFigures, dump_figures
from qwen_pipeline.evaluation.measurement import Measurement
from qwen_pipeline.progress import Observe, Progress, unobserved

KERNEL = "gptq_torch"
"""GPTQModel's kernel that multiplies, in the model's dtype, by the weights that the codes stand for.

For 4 bits on a CPU, Transformers would choose ``gptq_torch_aten``, which rounds activations and scales to bfloat16.
"""


class NotLoaded(Exception):
    """Transformers cannot load a checkpoint, or not all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What is kept of the reference: its output head, and what went into it, a tensor [T, H] for each window."""

    head: nn.Module
    hidden: Sequence[Tensor]

    def logits(self, window: int) -> Tensor:
        return self.head(self.hidden[window])


def measure(spec: Mapping[str, Any], observe: Observe) -> dict[str, Any]:
    """Run a :class:`Measurement`; return role -> :class:`ModelFigures`, both as JSON values.

    Raises:
        EnvironmentFault: This environment lacks what Transformers needs to load GPTQ.
    """
    _require_loaders()
    asked = Measurement.from_json(spec)
    windows = [torch.tensor(window) for window in asked.windows]
    figures: dict[str, ModelFigures] = {}
    reference: Reference | None = None
    for role, root in asked.in_order():
        observe(Progress(task=f"evaluate {role}", done=0, total=len(windows), unit="windows", remark="loading"))
        try:
            model = load_model(root)
        except NotLoaded as fault:
            figures[role] = ModelFigures(fault=str(fault))
            continue
        compared = reference if role in asked.compared else None
        figures[role], hidden = evaluate(model, windows, reference=compared, task=f"evaluate {role}", observe=observe)
        if role in asked.answering:
            answers = [greedy_answer(model, prompt, max_new_tokens=asked.max_new_tokens) for prompt in asked.prompts]
            figures[role] = replace(figures[role], answers=tuple(answers))
        if role == asked.reference:
            reference = Reference(head=_head(model), hidden=hidden)
        del model, hidden
        gc.collect()
    return dump_figures(figures)


def load_model(root: str) -> nn.Module:
    """Load a checkpoint as a user of Transformers does, on the CPU in float32, and account for every tensor.

    Raises:
        NotLoaded: Transformers raised, or loaded something else than the checkpoint: it gives missing weights random
            values and drops unexpected ones, and only logs that.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GPTQConfig

    try:
        quantization = getattr(AutoConfig.from_pretrained(root, local_files_only=True), "quantization_config", None)
        kernel = {"quantization_config": GPTQConfig(bits=quantization["bits"], backend=KERNEL)} if quantization else {}
        model, info = cast("Any", AutoModelForCausalLM).from_pretrained(
            root,
            dtype=torch.float32,
            device_map="cpu",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to be told which they are
            **kernel,
        )
    except MemoryError:
        raise
    except Exception as error:
        raise NotLoaded(f"{type(error).__name__}: {str(error).strip()[:600]}") from error
    if complaints := [f"{kind}: {_first(found)}" for kind, found in sorted(info.items()) if found]:
        raise NotLoaded(f"Not every tensor found its place; {'; '.join(complaints)}.")
    return model.eval()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    windows: Sequence[Tensor],
    *,
    reference: Reference | None = None,
    task: str = "evaluate",
    observe: Observe = unobserved,
) -> tuple[ModelFigures, list[Tensor]]:
    """Score every token but the first of each window, and compare each prediction with the reference's.

    Returns:
        The figures, and what went into the model's output head: a tensor [T, H] for each window.
    """
    nll: list[Tensor] = []
    divergences: list[Divergence] = []
    hidden: list[Tensor] = []
    for index, window in enumerate(windows):
        with _head_inputs(model) as inputs:
            logits = model(input_ids=window[None], use_cache=False).logits[0].float()
        hidden.append(inputs[0][0])
        nll.append(token_nll(logits[:-1], window[1:]))
        if reference:
            divergences.append(token_divergence(reference.logits(index)[:-1], logits[:-1]))
        observe(Progress(task=task, done=index + 1, total=len(windows), unit="windows"))
    surprise = torch.cat(nll)
    figures = ModelFigures(
        perplexity=surprise.mean().exp().item(),
        tokens=len(surprise),
        linears=_linears(model),
        divergence=summarize(divergences) if divergences else None,
    )
    return figures, hidden


def summarize(divergences: Sequence[Divergence]) -> DivergenceFigures:
    """Return mean, percentiles and maximum over the tokens of all windows."""
    kl_T = torch.cat([divergence.kl for divergence in divergences])
    agrees_T = torch.cat([divergence.agrees for divergence in divergences])
    return DivergenceFigures(
        mean=kl_T.mean().item(),
        p95=kl_T.quantile(0.95).item(),
        p99_9=kl_T.quantile(0.999).item(),
        max=kl_T.max().item(),
        top1_agreement=agrees_T.double().mean().item(),
    )


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


def _head(model: nn.Module) -> nn.Module:
    return cast("Any", model).get_output_embeddings()


@contextmanager
def _head_inputs(model: nn.Module) -> Generator[list[Tensor]]:
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    hook = _head(model).register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()


def _linears(model: nn.Module) -> dict[str, int]:
    names = [name for module in model.modules() if (name := type(module).__name__).endswith("Linear")]
    return {name: names.count(name) for name in sorted(set(names))}


def _first(found: Collection[object], limit: int = 5) -> str:
    names = sorted(map(str, found))
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")

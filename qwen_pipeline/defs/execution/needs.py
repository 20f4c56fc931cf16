"""The needs of each step, derived from the settings and the config of the base model.

The numbers are upper bounds of the figures in ``docs/performance.md`` with a margin, and depend on the width of a layer
and not on the number of layers. Disk is not among them: every stage writes into the store, which all machines share.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil

from qwen_pipeline.checkpoint.memory_budget import estimate_needs
from qwen_pipeline.checkpoint.thread_pool import MAX_THREADS
from qwen_pipeline.config import Settings, settings_of
from qwen_pipeline.config.execution import Step
from qwen_pipeline.config.file import config_file
from qwen_pipeline.errors import InputRefused
from qwen_pipeline.models.hub import cached_config
from qwen_pipeline.qwen.families import Config, number_of_experts, text_config
from qwen_pipeline.qwen.layers import layer_matrices, number_of_layers, required

GB = 10**9
MARGIN = 1.25
STREAM_CORES, COMPUTE_CORES = 4, 8
LIBRARIES = GB
"""Python, torch and Dagster."""
CUDA_LIBRARIES = 2 * GB
LAYERS_ON_HOST = 3
"""Copies of a layer that quantizing or evaluating layer by layer holds: read ahead, in use, and to be written."""
RANK_BYTES = 8 * GB
"""Memory of the host that a rank of a serving engine takes; on a CPU without the weights."""
SCORED_TOKENS = 65_536
"""Tokens whose hidden states benchmark tasks hold."""
_COMPUTING: frozenset[Step] = frozenset({"calibrate", "quantize", "validate"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Cores, memory of the host in bytes, and GPUs of a step."""

    cores: int
    memory_bytes: int = 0
    gpus: int = 0

    def most(self, other: "Needs") -> "Needs":
        """Return the greater of each number."""
        return Needs(
            cores=max(self.cores, other.cores),
            memory_bytes=max(self.memory_bytes, other.memory_bytes),
            gpus=max(self.gpus, other.gpus),
        )


def step_needs(settings: Settings) -> Mapping[Step, Needs]:
    """Return the needs of every step: the most that any base and recipe of the settings needs.

    Values in ``execution.needs`` replace derived ones.

    Raises:
        InputRefused: The memory of a step depends on a base model whose config is not here, and is not given.
    """
    given = {step for step, needs in settings.execution.needs.items() if needs.memory_gb}
    derived = _streaming()
    for product in _products(settings):
        name = product.base_model
        config = name and cached_config(name, revision=product.base_revision, relative_to=config_file().parent)
        if not config and (missing := sorted(_COMPUTING - given)):
            raise InputRefused(
                f"The memory of the step {missing[0]} depends on the base model, and the config of {name} is not here.",
                remedy="Set base_model to a directory that every machine sees, or give memory_gb in "
                f"[execution.needs.{missing[0]}].",
            )
        needs = _computing(product, config) if config else dict.fromkeys(_COMPUTING, Needs(cores=COMPUTE_CORES))
        derived |= {step: derived.get(step, need).most(need) for step, need in needs.items()}
    return {step: _overridden(settings, step, needs) for step, needs in derived.items()}


def _products(settings: Settings) -> Iterator[Settings]:
    """Yield the settings of each base with each recipe that may be applied to it."""
    for base in settings.bases or (None,):
        yield settings_of(settings, None, base=base)
        for name, recipe in settings.recipes.items():
            if recipe.base in (None, base):
                yield settings_of(settings, name, base=base)


def _overridden(settings: Settings, step: Step, needs: Needs) -> Needs:
    if (given := settings.execution.needs.get(step)) is None:
        return needs
    changes = {
        "cores": given.cores,
        "memory_bytes": given.memory_gb and int(given.memory_gb * GB),
        "gpus": given.gpus,
    }
    return replace(needs, **{name: value for name, value in changes.items() if value is not None})


def _streaming() -> dict[Step, Needs]:
    """Return the needs of the steps that stream a checkpoint in blocks."""
    streaming = estimate_needs(disk_bytes=0, threads=MAX_THREADS).memory_bytes
    needs = Needs(cores=STREAM_CORES, memory_bytes=_with_margin(LIBRARIES + streaming))
    return dict.fromkeys(("read", "merge", "pad", "publish", "repair"), needs)


def _computing(settings: Settings, config: Config) -> dict[Step, Needs]:
    """Return the needs of the steps that run layers of the model."""
    quantization, on_gpu = settings.quantization, settings.quantization.device == "cuda"
    sizes = _Sizes.of(config, itemsize=2 if on_gpu else 4)
    libraries = CUDA_LIBRARIES if on_gpu else LIBRARIES
    layers = libraries + LAYERS_ON_HOST * sizes.layer
    tokens = quantization.samples * quantization.seq_len
    quantizing = layers + 2 * tokens * sizes.token + (0 if on_gpu else 3 * sizes.hessian)
    if quantization.engine != "layerwise":
        quantizing += sizes.model
    is_mixture = number_of_experts(config) > 0
    gpus, streaming = int(on_gpu), _streaming()["pad"]
    calibrate = Needs(cores=COMPUTE_CORES, memory_bytes=_with_margin(layers + 2 * tokens * sizes.token), gpus=gpus)
    quantize = Needs(
        cores=quantization.threads,
        memory_bytes=_with_margin(quantizing),
        gpus=quantization.gpus if on_gpu else 0,
    )
    served_bytes, served_gpus = _serving(settings, sizes)
    scoring = 2 * SCORED_TOKENS * sizes.token if settings.validation.lm_eval.tasks else 0
    validate = Needs(
        cores=COMPUTE_CORES,
        memory_bytes=_with_margin(max(layers + sizes.head + scoring, served_bytes)),
        gpus=max(gpus, served_gpus),
    )
    return {
        "calibrate": calibrate if is_mixture else streaming,
        "quantize": quantize if quantization.method == "gptq" else streaming,
        "validate": validate,
    }


def _serving(settings: Settings, sizes: "_Sizes") -> tuple[int, int]:
    """Return the memory and the GPUs of the largest server that a validation starts."""
    serve = settings.validation.serve
    if serve.engine is None:
        return 0, 0
    ranks = max(serve.tensor_parallel or tuple(settings.padding_spec.degrees))
    if serve.engine == "vllm":
        return ranks * RANK_BYTES, ranks
    return ranks * RANK_BYTES + sizes.model, 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """Bytes of parts of a model, in the format in which it computes.

    Attributes:
        layer: The largest decoder layer.
        model: All layers and both embeddings.
        head: The output head.
        token: The hidden state of a token.
        hessian: The largest Hessian, in float32.
    """

    layer: int
    model: int
    head: int
    token: int
    hessian: int

    @classmethod
    def of(cls, config: Config, *, itemsize: int) -> "_Sizes":
        hidden = required(config, "hidden_size")
        head = int(text_config(config)["vocab_size"]) * hidden * itemsize
        layers = [list(layer_matrices(config, layer)) for layer in range(number_of_layers(config))]
        weights = [sum(each.count * each.out_features * each.in_features for each in layer) for layer in layers]
        return cls(
            layer=max(weights) * itemsize,
            model=sum(weights) * itemsize + 2 * head,
            head=head,
            token=hidden * itemsize,
            hessian=4 * max(each.in_features for layer in layers for each in layer) ** 2,
        )


def _with_margin(nbytes: int) -> int:
    """Return whole GB that are enough."""
    return ceil(nbytes * MARGIN / GB) * GB

"""Settings of a quantization: everything that determines the bytes that a quantizer writes."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from qwen_pipeline.errors import InputRefused
from qwen_pipeline.quantization.calibration.spec import CalibrationSpec, Packing
from qwen_pipeline.quantization.recipes import RECIPES, Recipe, RecipeName
from qwen_pipeline.quantization.validators import require_at_least, require_choice, require_share
from qwen_pipeline.qwen.families import Config
from qwen_pipeline.qwen.methods import FP8_LAYOUTS, Method
from qwen_pipeline.qwen.precision import ModuleRules, Precision, Preset, preset_words
from qwen_pipeline.transforms.codes.gptq import GptqFormat, gptq_format
from qwen_pipeline.workers.environments import MAIN, EnvironmentName

QuantizerName = Literal["layerwise", "gptqmodel", "autogptq"]
Device = Literal["cpu", "cuda"]
OVERRIDES = ("damp_percent", "mse")
"""Settings that can be overridden for single modules by ``dynamic``; ``modules`` decides on bits and groups."""
LEFT_OUT: Mapping[str, Any] = {"method": "gptq", "recipe": "gptq", "precision": "uniform", "modules": []}
"""Values that are left out of manifests, so that derivation keys are those of versions without these fields."""
OF_CODES = ("recipe", "sym", "group_size", "desc_act", "damp_percent", "dynamic", "mse", "precision", "modules")
"""Settings of integer codes that 8-bit floats do not have."""


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def default_device() -> Device:
    """Return ``cuda`` if the machine has an NVIDIA GPU, else ``cpu``; torch is not imported."""
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """Settings of a quantization. Two runs with equal specs, inputs and versions write the same bytes.

    Sums of floats depend on the division of the work, so ``batch_size``, ``threads``, ``device`` and ``gpus`` are part
    of it.

    Attributes:
        method: ``gptq``, or 8-bit floats in one of three layouts: ``fp8`` is Transformers' and Qwen's own, with a scale
            for each block of 128 x 128; ``fp8-block`` has the same blocks as compressed-tensors; ``fp8-dynamic``,
            compressed-tensors too, has a scale for each output. 8-bit floats need no calibration and no GPU, and
            ignore the settings of the tokens and of the machine; those of integer codes must be left at their defaults.
        engine: The quantizer: ``layerwise`` is this package's own loop over GPTQModel's solver, the others are
            libraries.
        recipe: The steps with which codes are chosen: ``gptq`` is GPTQModel's solver alone, the others lose less at the
            same size and need ``layerwise`` and symmetric codes; see :mod:`qwen_pipeline.quantization.recipes`.
        bits: Bits of a code, 4 or 8.
        group_size: Consecutive input channels that share one scale.
        sym: Whether the grid is symmetric about zero, as the fast serving kernels require.
        desc_act: Whether columns are quantized by descending activation (slower to serve under tensor parallelism).
        act_group_aware: Whether groups are quantized by descending activation, which keeps every group in its place
            and costs nothing to serve. Ignored with ``desc_act``; not supported by AutoGPTQ.
        damp_percent: Share of the mean Hessian diagonal that is added to it.
        dynamic: Regular expression, searched for in the module's name -> settings of the module (GPTQModel's
            ``dynamic``). Only ``damp_percent`` and ``mse``, which do not change the format of the codes; the first
            match counts.
        precision: What else than ``bits`` and ``group_size`` the modules get: ``uniform`` is nothing else, ``official``
            what Qwen itself leaves out of its releases of the family (:mod:`qwen_pipeline.qwen.precision`).
        modules: Regular expression of RE2, searched for in the module's name -> its precision: ``keep`` for the weight
            as it is, bits such as ``8``, or bits and group size such as ``4g32``. The first match counts, and comes
            before that of ``precision``. Needs ``layerwise``.
        mse: Exponent of the error that a search over clipped scales minimizes, such as 2.4; 0 uses the extreme values.
        samples: Number of windows of calibration tokens.
        seq_len: Tokens per calibration window.
        seed: Decides which records of the calibration text are drawn, and their order.
        packing: ``stream`` fills the windows with one record after another, ``documents`` gives each record windows of
            its own.
        all_experts: Whether every expert is calibrated with every token, regardless of the router.
        batch_size: Number of windows per forward pass.
        threads: Threads of one CPU operation.
        device: ``cpu`` computes in float32, ``cuda`` in 16 bit (the checkpoint's dtype; AutoGPTQ in float16).
        gpus: Number of GPUs, the first ones that are visible. GPTQModel's own loop distributes windows and modules
            over several; the other quantizers use one.
    """

    method: Method = "gptq"
    engine: QuantizerName = "layerwise"
    recipe: RecipeName = "gptq"
    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    act_group_aware: bool = True
    damp_percent: float = 0.05
    mse: float = 0.0
    dynamic: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])
    precision: Preset = "uniform"
    modules: Mapping[str, str | int] = field(default_factory=dict[str, str | int])
    samples: int = 128
    seq_len: int = 2048
    seed: int = 42
    packing: Packing = "stream"
    all_experts: bool = False
    batch_size: int = 8
    threads: int = field(default_factory=usable_cores)
    device: Device = field(default_factory=default_device)
    gpus: int = 1

    def __post_init__(self) -> None:
        require_choice("method", self.method, get_args(Method))
        require_choice("engine", self.engine, get_args(QuantizerName))
        require_choice("recipe", self.recipe, get_args(RecipeName))
        require_choice("device", self.device, get_args(Device))
        require_choice("bits", self.bits, (4, 8))
        require_choice("group_size", self.group_size, (32, 64, 128))
        require_choice("precision", self.precision, get_args(Preset))
        object.__setattr__(self, "modules", {pattern: str(word) for pattern, word in dict(self.modules).items()})
        self.rules.require_valid()
        for name in ("batch_size", "threads", "gpus"):
            require_at_least(name, getattr(self, name), low=1)
        if self.gpus > 1 and (self.device == "cpu" or self.engine != "gptqmodel"):
            raise InputRefused(
                f"gpus is {self.gpus}, but the quantizer is {self.engine} on {self.device}.",
                remedy="Leave gpus at 1, or set engine to 'gptqmodel' and device to 'cuda'.",
            )
        require_at_least("mse", self.mse, low=0)
        require_share("damp_percent", self.damp_percent)
        if self.engine == "autogptq":
            self._require_supported_by_autogptq()
        if self.recipe != "gptq":
            self._require_supported_by_recipe()
        self._require_valid_overrides()
        if self.method != "gptq":
            self._require_no_setting_of_codes()
        if (self.modules or self.precision != "uniform") and self.engine != "layerwise":
            raise InputRefused(
                f"modules or precision is set, but {self.engine} gives all modules one format here.",
                remedy="Set engine to 'layerwise', or leave both at their defaults.",
            )
        _ = self.calibration  # validates its settings

    def _require_no_setting_of_codes(self) -> None:
        defaults = {each.name: each.default for each in fields(self)}
        for name in OF_CODES:
            value = getattr(self, name)
            if value != ({} if isinstance(value, Mapping) else defaults[name]):
                raise InputRefused(
                    f"The method is {self.method!r}, whose 8-bit floats have no {name}, but {name} is {value!r}.",
                    remedy=f"Leave {name} at its default, or set method to 'gptq'.",
                )

    def _require_supported_by_autogptq(self) -> None:
        unsupported = (
            (self.packing == "documents", "AutoGPTQ does not mask pad tokens, but packing is 'documents'."),
            (self.all_experts, "AutoGPTQ calibrates experts only on tokens routed to them, but all_experts is set."),
            (self.mse != 0, f"AutoGPTQ does not search for scales, but mse is {self.mse}."),
            (not self.act_group_aware, "AutoGPTQ never reorders groups, but act_group_aware is set to false."),
            (bool(self.dynamic), "AutoGPTQ has the same settings for all modules, but dynamic is set."),
        )
        for is_set, reason in unsupported:
            if is_set:
                raise InputRefused(reason, remedy="Leave this setting at its default, or choose another engine.")

    def _require_supported_by_recipe(self) -> None:
        unsupported = (
            (self.engine != "layerwise", f"the engine is {self.engine!r}", "engine to 'layerwise'"),
            (not self.sym, "sym is set to false", "sym to true"),
            (self.desc_act, "desc_act is set", "desc_act to false"),
            (self.mse != 0, f"mse is {self.mse}, another search for scales", "mse to 0"),
            (any("mse" in each for each in self.dynamic.values()), "dynamic sets mse", "only damp_percent there"),
        )
        for is_set, reason, remedy in unsupported:
            if is_set:
                raise InputRefused(
                    f"The recipe is {self.recipe!r}, but {reason}.", remedy=f"Set {remedy}, or recipe to 'gptq'."
                )

    def _require_valid_overrides(self) -> None:
        for pattern, settings in self.dynamic.items():
            if unknown := sorted(settings.keys() - set(OVERRIDES)):
                raise InputRefused(
                    f"dynamic {pattern!r} sets {', '.join(unknown)}; the bits and groups of modules are set in"
                    " modules.",
                    remedy=f"Override only {', '.join(OVERRIDES)}; for other bits write, for example, --module"
                    f" '{pattern}=8'.",
                )
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputRefused(
                    f"dynamic {pattern!r} is not a regular expression: {error}.", remedy="Correct the expression."
                ) from error
            require_share(f"dynamic {pattern!r} damp_percent", settings.get("damp_percent", self.damp_percent))
            require_at_least(f"dynamic {pattern!r} mse", settings.get("mse", self.mse), low=0)

    def override(self, module: str) -> Mapping[str, float]:
        """Return the overrides that apply to a module."""
        return next((settings for pattern, settings in self.dynamic.items() if re.search(pattern, module)), {})

    @property
    def rules(self) -> ModuleRules:
        """The precision of every module, without that of a preset."""
        default = Precision(bits=self.bits, group_size=self.group_size)
        return ModuleRules(default=default, words={pattern: str(word) for pattern, word in self.modules.items()})

    def for_model(self, config: Config) -> "QuantSpec":
        """Return the spec with the preset's precisions for a family among its ``modules``."""
        words = preset_words(self.precision, str(config.get("model_type")))
        added = {pattern: word for pattern, word in words.items() if pattern not in self.modules}
        return replace(self, precision="uniform", modules={**self.modules, **added})

    def precision_of(self, module: str) -> Precision:
        """Return the precision of a module."""
        return self.rules.of(module)

    def of(self, module: str) -> "QuantSpec":
        """Return the spec with the bits and the group size of a module that gets codes."""
        own = self.precision_of(module)
        assert own.bits, f"{module} gets no codes"
        assert own.group_size, f"{module} has no groups"
        return self if own == self.rules.default else replace(self, bits=own.bits, group_size=own.group_size)

    def forms(self, modules: Iterable[str]) -> dict[str, GptqFormat]:
        """Return module -> format of its codes, for those of ``modules`` that get codes of another format."""
        form = gptq_format({"quantization_config": self.quantization_config("")})
        others = {module: own for module in modules if (own := self.precision_of(module)) != self.rules.default}
        return {
            module: replace(form, bits=own.bits, group_size=own.group_size)
            for module, own in others.items()
            if own.bits and own.group_size
        }

    @property
    def environment(self) -> EnvironmentName:
        """Environment that the quantizer runs in; ``layerwise`` uses GPTQModel's solver and so its environment."""
        if self.method != "gptq":
            return MAIN
        return "autogptq" if self.engine == "autogptq" else "gptqmodel"

    @property
    def calibration(self) -> CalibrationSpec:
        """The settings that determine which tokens are drawn."""
        return CalibrationSpec(**{name: getattr(self, name) for name in CalibrationSpec.fields()})

    @property
    def needs_calibration(self) -> bool:
        return self.method == "gptq"

    @property
    def reads_files(self) -> bool:
        """True if the engine reads stored weights itself, instead of a checkpoint that this package opens."""
        return self.needs_calibration and self.engine != "layerwise"

    @property
    def padding_unit(self) -> int:
        """Channels that a rank must hold whole: a group of codes, a block of floats, or what kernels align to.

        Of the groups of several modules it is the largest, so that all of them have whole groups.
        """
        if layout := FP8_LAYOUTS.get(self.method):
            return layout.unit
        own = map(self.rules.read, self.rules.words.values())
        return max([self.group_size, *(each.group_size or 0 for each in own)])

    @property
    def steps(self) -> Recipe:
        return RECIPES[self.recipe]

    def to_json(self) -> dict[str, Any]:
        """Return the fields that decide the bytes; of 8-bit floats, the method alone.

        Values in :data:`LEFT_OUT` are left out; the order of ``modules`` is kept.
        """
        if self.method != "gptq":
            return {"method": self.method}
        values = {**asdict(self), "modules": [list(rule) for rule in self.modules.items()]}
        return {name: value for name, value in values.items() if LEFT_OUT.get(name, ...) != value}

    def quantization_config(self, quantizer: str) -> dict[str, Any]:
        """Return the ``quantization_config`` of ``config.json`` that Transformers, vLLM and GPTQModel can load.

        Args:
            quantizer: Producer of the codes, as ``name:version``; GPTQModel requires it to load asymmetric codes.
        """
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.sym,
            "desc_act": self.desc_act,
            "lm_head": False,
            "format": "gptq",
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "meta": {
                "quantizer": [quantizer],
                "damp_percent": self.damp_percent,
                "mse": self.mse,
                "act_group_aware": self.act_group_aware and not self.desc_act and self.engine != "autogptq",
                "true_sequential": True,
                **({} if self.recipe == "gptq" else {"recipe": self.recipe}),
            },
        }


def parse_overrides(texts: Iterable[str]) -> dict[str, dict[str, float]]:
    """Parse ``REGEX:name=number[,name=number]`` into a value for ``dynamic``.

    Raises:
        InputRefused: A text has another form.
    """
    dynamic: dict[str, dict[str, float]] = {}
    for text in texts:
        pattern, _, settings = text.rpartition(":")
        try:
            named = dict(setting.split("=") for setting in settings.split(","))
            dynamic[pattern] = {name.strip(): float(number) for name, number in named.items()}
        except ValueError as error:
            raise InputRefused(
                f"The override {text!r} is not of the form REGEX:name=number.",
                remedy=r"Write it as in 'mlp\.down_proj:damp_percent=0.1'.",
            ) from error
    return dynamic

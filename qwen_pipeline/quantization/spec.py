"""What every engine is told: the settings that decide the bytes it writes."""

import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from qwen_pipeline.errors import EnvironmentFault, InputRefused
from qwen_pipeline.workers.environments import EnvironmentName

QuantizerName = Literal["layerwise", "gptqmodel", "autogptq"]
Device = Literal["cpu", "cuda"]
Packing = Literal["stream", "documents"]
OVERRIDES = ("damp_percent", "mse")
"""Settings that a module may have of its own."""
MIN_EXPERT_TOKENS = 128
"""With fewer tokens than inputs in a group, a Hessian cannot tell the group's inputs apart."""


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def default_device() -> Device:
    """A GPU where the machine has one."""
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSpec:
    """Which tokens a model is calibrated with.

    Attributes:
        samples: Windows of tokens.
        seq_len: Tokens per window.
        seed: Decides which records are drawn, and their order.
        packing: ``stream`` fills every window with record after record, ``documents`` gives a record its own windows.
    """

    samples: int = 128
    seq_len: int = 2048
    seed: int = 42
    packing: Packing = "stream"

    def __post_init__(self) -> None:
        _require("packing", self.packing, get_args(Packing))
        for name in ("samples", "seq_len"):
            _require_range(name, getattr(self, name), low=1)

    @classmethod
    def fields(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """How a checkpoint is quantized. Two runs with equal specs, inputs and versions write the same bytes.

    Sums of floats depend on how work is cut, so ``batch_size``, ``threads``, ``device`` and ``gpus`` belong here too.

    Attributes:
        engine: ``layerwise`` is the loop of our own over GPTQModel's solver, the others are libraries.
        group_size: Consecutive input channels that share one scale.
        sym: Whether the grid is symmetric about zero, which the fast serving kernels want.
        desc_act: Quantize columns in the order of falling activation (slower to serve under tensor parallelism).
        act_group_aware: Whether groups are quantized in the order of falling activation, which leaves every group where
            it is and costs nothing to serve. ``desc_act`` takes its place; AutoGPTQ does not have it.
        damp_percent: Share of the mean Hessian diagonal that is added to it.
        dynamic: Regular expression, found in a module's name -> settings of its own (GPTQModel's ``dynamic``). Only
            :data:`OVERRIDES`, which leave the format of codes alike everywhere; the first match counts.
        mse: Exponent of the error that a search over clipped scales minimizes, such as 2.4; 0 takes the extreme values.
        samples: With ``seq_len``, ``seed`` and ``packing``: see :class:`CalibrationSpec`.
        all_experts: Whether every expert is calibrated with every token, whatever the router says.
        threads: Threads of one CPU operation.
        device: ``cpu`` computes in float32, ``cuda`` in 16 bit (the checkpoint's dtype; AutoGPTQ in float16).
        gpus: The first so many of the GPUs that are visible. GPTQModel's own loop shares out windows and modules among
            several; the other engines take one.
    """

    engine: QuantizerName = "layerwise"
    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    act_group_aware: bool = True
    damp_percent: float = 0.05
    mse: float = 0.0
    dynamic: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])
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
        _require("engine", self.engine, get_args(QuantizerName))
        _require("device", self.device, get_args(Device))
        _require("bits", self.bits, (4, 8))
        _require("group_size", self.group_size, (32, 64, 128))
        for name in ("batch_size", "threads", "gpus"):
            _require_range(name, getattr(self, name), low=1)
        if self.gpus > 1 and (self.device == "cpu" or self.engine != "gptqmodel"):
            raise InputRefused(
                f"gpus is {self.gpus}, but the engine is {self.engine} on {self.device}.",
                remedy="Leave gpus at 1, or use the engine gptqmodel on CUDA.",
            )
        if self.calibration.packing == "documents" and self.engine == "autogptq":
            raise InputRefused(
                "AutoGPTQ would take filling for text, packing is 'documents'.",
                remedy="Pack as a stream, or use another engine.",
            )
        if self.all_experts and self.engine == "autogptq":
            raise InputRefused(
                "AutoGPTQ calibrates experts with the tokens routed to them.",
                remedy="Leave out all_experts, or use another engine.",
            )
        _require_range("mse", self.mse, low=0)
        if self.mse and self.engine == "autogptq":
            raise InputRefused(f"AutoGPTQ does not search scales, mse is {self.mse}.", remedy="Leave mse at 0.")
        if not self.act_group_aware and self.engine == "autogptq":
            raise InputRefused("AutoGPTQ never reorders groups.", remedy="Leave act_group_aware as it is.")
        _require_share("damp_percent", self.damp_percent)
        self._require_overrides()

    def _require_overrides(self) -> None:
        if self.dynamic and self.engine == "autogptq":
            raise InputRefused(
                "AutoGPTQ has one setting for all modules.", remedy="Leave dynamic out, or use another engine."
            )
        for pattern, settings in self.dynamic.items():
            if unknown := sorted(settings.keys() - set(OVERRIDES)):
                raise InputRefused(
                    f"dynamic {pattern!r} sets {', '.join(unknown)}; one checkpoint has codes of one format.",
                    remedy=f"Override {', '.join(OVERRIDES)} only.",
                )
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputRefused(
                    f"dynamic {pattern!r} is no regular expression: {error}.", remedy="Correct it."
                ) from error
            _require_share(f"dynamic {pattern!r} damp_percent", settings.get("damp_percent", self.damp_percent))
            _require_range(f"dynamic {pattern!r} mse", settings.get("mse", self.mse), low=0)

    def override(self, module: str) -> Mapping[str, float]:
        """Return a module's own settings."""
        return next((own for pattern, own in self.dynamic.items() if re.search(pattern, module)), {})

    @property
    def environment(self) -> EnvironmentName:
        """Whose environment the engine runs in: the layer loop of our own drives GPTQModel's solver."""
        return "autogptq" if self.engine == "autogptq" else "gptqmodel"

    @property
    def calibration(self) -> CalibrationSpec:
        """The part that says which tokens are drawn."""
        return CalibrationSpec(**{name: getattr(self, name) for name in CalibrationSpec.fields()})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def quantization_config(self, quantizer: str) -> dict[str, Any]:
        """Return what ``config.json`` says about the codes, so that Transformers, vLLM and GPTQModel can load them.

        Args:
            quantizer: Who made them, as ``name:version``; GPTQModel demands it of asymmetric checkpoints.
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
            },
        }


def parse_overrides(texts: Iterable[str]) -> dict[str, dict[str, float]]:
    """Read ``REGEX:name=number[,name=number]`` into what ``dynamic`` holds.

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
                remedy=r"Write, for example, 'mlp\.down_proj:damp_percent=0.1'.",
            ) from error
    return dynamic


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantJob:
    """One run of an engine.

    Attributes:
        source: The checkpoint to quantize.
        windows: A ``.npy`` file of token ids, int32 ``[samples, seq_len]``. Beside it lies ``mask``, uint8, which is 0
            for filling.
        work_dir: A directory that the engine may fill as it likes.
    """

    spec: QuantSpec
    source: Path
    windows: Path
    work_dir: Path

    @property
    def mask(self) -> Path:
        return self.windows.with_name("mask.npy")

    @property
    def packed(self) -> Path:
        """Where the engine's checkpoint is expected: ``config.json`` and safetensors files."""
        return self.work_dir / "packed"

    @property
    def quant_log(self) -> Path:
        """Where the engine's table is expected: ``layer,module,loss,samples,damp``, and more where it knows more.

        See :class:`qwen_pipeline.quantization.losses.ModuleLoss` for the columns.
        """
        return self.packed / "quant_log.csv"

    @property
    def resume(self) -> Path:
        """What an engine may leave for its next attempt, should it be interrupted."""
        return self.work_dir / "resume"

    def to_json(self) -> dict[str, Any]:
        paths = {name: str(getattr(self, name)) for name in ("source", "windows", "work_dir")}
        return {"spec": self.spec.to_json(), **paths}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "QuantJob":
        paths = {name: Path(value[name]) for name in ("source", "windows", "work_dir")}
        return cls(spec=QuantSpec(**value["spec"]), **paths)


def use_work_dir(job: QuantJob) -> None:
    """Have libraries put what is temporary, as weights that they offload, into the workshop; for the engine's process.

    Its disk has room for a model; that of the system's directory may not.
    """
    scratch = job.work_dir / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)


def require_device(spec: QuantSpec) -> None:
    """Refuse to start without the devices of the spec; called in the engine's process.

    Raises:
        EnvironmentFault: The spec wants CUDA and torch sees none, or fewer GPUs than it says.
    """
    import torch  # the command line reads specs without it

    if spec.device == "cuda" and (seen := torch.cuda.device_count()) < spec.gpus:
        raise EnvironmentFault(
            f"The spec wants {spec.gpus} GPUs, torch {torch.__version__} of the engine's environment sees {seen}.",
            remedy="Lower gpus, quantize with device 'cpu', or use a machine with GPUs and a CUDA build of torch.",
        )


def _require(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        choices = ", ".join(map(str, allowed))
        raise InputRefused(f"{name} is {value!r}, expected one of {choices}.", remedy=f"Set {name} to one of them.")


def _require_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise InputRefused(f"{name} is {value}, expected more than 0 and less than 1.", remedy="Try 0.05.")


def _require_range(name: str, value: float, *, low: float) -> None:
    if value < low:
        raise InputRefused(f"{name} is {value}, expected at least {low}.", remedy=f"Raise {name}.")

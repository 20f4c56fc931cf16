"""One run of a quantizer: its inputs, its working directory, and the preparation of its process."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_pipeline.errors import EnvironmentFault
from qwen_pipeline.quantization.spec import QuantSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantJob:
    """One run of a quantizer.

    Attributes:
        source: The checkpoint to quantize.
        windows: A ``.npy`` file of token ids, int32 ``[samples, seq_len]``. ``mask`` is next to it, uint8, 0 for
            pad tokens.
        work_dir: A directory for all files of the quantizer.
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
        """Directory of the quantizer's checkpoint: ``config.json`` and safetensors files."""
        return self.work_dir / "packed"

    @property
    def quant_log(self) -> Path:
        """The solver's log; see :mod:`qwen_pipeline.quantization.losses` for its columns."""
        return self.packed / "quant_log.csv"

    @property
    def resume(self) -> Path:
        """Directory of the state from which an interrupted run can be resumed."""
        return self.work_dir / "resume"

    def to_json(self) -> dict[str, Any]:
        paths = {name: str(getattr(self, name)) for name in ("source", "windows", "work_dir")}
        return {"spec": self.spec.to_json(), **paths}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "QuantJob":
        paths = {name: Path(value[name]) for name in ("source", "windows", "work_dir")}
        return cls(spec=QuantSpec(**value["spec"]), **paths)


def use_work_dir(job: QuantJob) -> None:
    """Direct temporary files of libraries, such as offloaded weights, to the working directory.

    Called in the quantizer's process. The disk of the working directory has space for a model; the system's
    temporary directory may not.
    """
    scratch = job.work_dir / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)


def require_device(spec: QuantSpec) -> None:
    """Require the devices of the spec; called in the quantizer's process.

    Raises:
        EnvironmentFault: The spec requires CUDA, and torch sees fewer GPUs than that.
    """
    import torch  # the command line reads specs without it

    if spec.device == "cuda" and (visible := torch.cuda.device_count()) < spec.gpus:
        raise EnvironmentFault(
            f"The spec requires {spec.gpus} GPUs, but torch {torch.__version__} of the quantizer's environment sees"
            f" {visible}.",
            remedy="Lower gpus, quantize with device 'cpu', or use a machine with GPUs and a CUDA build of torch.",
        )


def shard_of(packed: Path, layer: int) -> Path:
    """Return the file in which the layer loop writes a layer's codes."""
    return packed / f"layer-{layer:05d}.safetensors"


def record_of(packed: Path, layer: int) -> Path:
    """Return the file that the layer loop writes last for a layer."""
    return shard_of(packed, layer).with_suffix(".json")

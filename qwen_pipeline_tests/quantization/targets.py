"""Worker functions for tests, run in GPTQModel's environment."""

import shutil
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.layerwise.forward import LayerStream, logit_blocks
from qwen_pipeline.progress import Observe, unobserved
from qwen_pipeline.quantization import gptqmodel, layerwise, solver
from qwen_pipeline.quantization.layerwise import LayerLoop
from qwen_pipeline.quantization.solver import Hessian, pack, solve
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.transforms.codes.gptq import GptqFormat, PackedLinear

LAST_LAYER = "layer-00001"


def contract(_: Mapping[str, Any], __: Observe) -> dict[str, Any]:
    """Compare :func:`solve` with GPTQModel's own accumulation and solving."""
    torch.manual_seed(0)
    spec = QuantSpec(group_size=32, device="cpu", threads=1)
    weights, x = (torch.randn(64, 96), torch.randn(32, 96)), torch.randn(256, 96)
    named, before = {"q": weights[0], "k": weights[1]}, [weight.clone() for weight in weights]
    library: Any = import_module("gptqmodel.quantization").GPTQ
    factored: list[int] = []
    factor = library.hessian_inverse

    def counted(self: Any, hessian: torch.Tensor) -> Any:
        factored.append(len(hessian))
        return factor(self, hessian)

    with patch.object(library, "hessian_inverse", counted):
        ours = list(solve(named, hessian_of(x), spec))
    theirs = [solve_with_gptqmodel(library, weight, x, ours[0].packed.format) for weight in weights]
    x[:, 5] = 0
    dead = list(solve(named, hessian_of(x), spec))
    return {
        "same_codes": [torch.equal(our.packed.qweight, their.qweight) for our, their in zip(ours, theirs, strict=True)],
        "factored": factored,
        "dead_are_zero": [not one.packed.weight_rows(0, 32)[:, 5].any() for one in dead],
        "inputs_untouched": all(map(torch.equal, weights, before)),
        "damp": ours[0].damp,
        "without_tokens": next(solve(named, Hessian(96), spec)).loss,
    }


def hessian_of(x: torch.Tensor) -> Hessian:
    hessian = Hessian(x.shape[-1])
    hessian.add(x)
    return hessian


def solve_with_gptqmodel(solver: Any, weight: torch.Tensor, x: torch.Tensor, form: GptqFormat) -> PackedLinear:
    """Accumulate and solve for one weight with GPTQModel, without a shared factorization."""
    library: Any = import_module("gptqmodel")
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    gptq = solver(linear, qcfg=library.GPTQConfig(bits=4, group_size=32, damp_percent=0.05, fallback=None))
    gptq.quantizer.configure(perchannel=True)
    gptq.add_batch(x, None)
    rounded, scales, zeros, g_idx = gptq.quantize()[:4]
    return pack(rounded.detach(), scales, zeros, g_idx, form)


def lose_a_thread(_: Mapping[str, Any], __: Observe) -> dict[str, Any]:
    """Exhaust memory in one of GPTQModel's threads whose result is not awaited."""
    gptqmodel.patch_thread_pool()
    threads: Any = import_module("gptqmodel").DEVICE_THREAD_POOL
    threads.submit("cpu", bytearray, 2**62)
    time.sleep(600)
    return {}


def quantize_families(spec: Mapping[str, Any], _: Observe) -> dict[str, Any]:
    """Quantize tiny models with the layer loop; save the logits of the model in memory.

    In a second directory, ``-resumed``, the last layer is quantized again by a loop that resumes there.
    """
    for name, source in spec["sources"].items():
        out, resumed = Path(spec["out"]) / name, Path(spec["out"]) / f"{name}-resumed"
        out.mkdir()
        loop = quantize_family(Path(source), out, spec)
        shutil.copytree(out, resumed)
        for file in resumed.glob(f"{LAST_LAYER}.*"):
            file.unlink()
        quantize_family(Path(source), resumed, spec)
        save_file({"logits": logits(loop.stream)}, out / "own.logits")
    return {}


def quantize_family(source: Path, out: Path, spec: Mapping[str, Any]) -> LayerLoop:
    everything = torch.ones_like(windows(), dtype=torch.bool)
    loop = LayerLoop(open_checkpoint(source), windows(), everything, QuantSpec(**spec["quant"]), out)
    loop.run(unobserved)
    return loop


def quantize_with_unrounded_scales(spec: Mapping[str, Any], observe: Observe) -> Mapping[str, Any]:
    """Run the layer loop with the weights that GPTQModel computes inputs with: scales are not rounded to float16."""
    weights: list[torch.Tensor] = []

    def keep(rounded_OI: torch.Tensor, *others: Any) -> PackedLinear:
        weights.append(rounded_OI.clone())
        return pack(rounded_OI, *others)

    def put(_: PackedLinear, weight_OI: torch.Tensor) -> None:
        weight_OI.copy_(weights.pop())

    with patch.object(solver, "pack", keep), patch.object(PackedLinear, "write_weight", put):
        return layerwise.quantize_directory(spec, observe)


def windows() -> torch.Tensor:
    return torch.randint(3, 256, (16, 64), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def logits(stream: LayerStream) -> torch.Tensor:
    """Return float32 logits [tokens, V] of batches that have passed all layers."""
    parts: dict[int, list[torch.Tensor]] = {}
    for block in logit_blocks([stream], stream.context):
        parts.setdefault(block.batch, []).append(block.values[0])
    return torch.cat([torch.cat(part, dim=-1) for part in parts.values()])


def gptqmodel_logits(spec: Mapping[str, Any], _: Observe) -> dict[str, Any]:
    """Load a checkpoint with GPTQModel; return its float32 logits for the first tokens, and its layers by their bits.

    The kernel loads in 16 bits; products of codes and scales are exact once the scales are float32.
    """
    library: Any = import_module("gptqmodel")
    model = library.GPTQModel.load(
        spec["model"], device="cpu", backend=library.BACKEND("gptq_torch"), dtype=torch.float16
    )
    found = model.model.float().eval()
    bits = [str(module.bits) for module in found.modules() if hasattr(module, "qweight")]
    with torch.inference_mode():
        values = found(torch.arange(48)[None]).logits.flatten().tolist()
    return {"logits": values, "linears": {each: bits.count(each) for each in sorted(set(bits))}}

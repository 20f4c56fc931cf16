"""The linear layers of a dense Qwen decoder: the seven of each layer that are quantized."""

import re
from dataclasses import dataclass

from qwen_pipeline.checkpoint.lazy import Checkpoint
from qwen_pipeline.errors import InputRefused, listed

DECODER_LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
_IN_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)\.weight$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One linear layer: ``module`` is its name without ``.weight``, ``kind`` one of :data:`DECODER_LINEARS`."""

    module: str
    layer: int
    kind: str
    out_features: int
    in_features: int


def decoder_linears(checkpoint: Checkpoint) -> list[Linear]:
    """Return the linear layers of every decoder layer, by layer and in the order of :data:`DECODER_LINEARS`.

    Raises:
        InputRefused: A layer lacks one of :data:`DECODER_LINEARS`, or has matrices besides them (experts, linear
            attention).
    """
    linears: list[Linear] = []
    for name, spec in checkpoint.items():
        match = _IN_LAYER.search(name)
        if not match or len(spec.shape) < 2:
            continue
        layer, kind = int(match[1]), match[2]
        if kind not in DECODER_LINEARS or len(spec.shape) != 2:
            raise InputRefused(
                f"{name} {list(spec.shape)} is not one of the linear layers of a dense Qwen decoder.",
                remedy="Mixtures of experts and linear attention are not supported yet; use a dense Qwen model.",
            )
        linears.append(
            Linear(
                module=name.removesuffix(".weight"),
                layer=layer,
                kind=kind,
                out_features=spec.shape[0],
                in_features=spec.shape[1],
            )
        )
    found = {(linear.layer, linear.kind) for linear in linears}
    layers = sorted({linear.layer for linear in linears})
    missing = [f"layers.{i}.{kind}" for i in layers for kind in DECODER_LINEARS if (i, kind) not in found]
    if missing or not linears:
        raise InputRefused(
            f"The checkpoint lacks linear layers of a dense Qwen decoder: {listed(missing) or 'all of them'}.",
            remedy="Use a complete checkpoint of a dense Qwen model.",
        )
    return sorted(linears, key=lambda linear: (linear.layer, DECODER_LINEARS.index(linear.kind)))

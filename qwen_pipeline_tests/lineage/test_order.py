"""The order of the stages where padding has nothing to add, so that merged and padded have one content digest."""

from collections.abc import Mapping
from itertools import permutations
from pathlib import Path

from qwen_pipeline.checkpoint.store.destinations import CheckpointStore
from qwen_pipeline.lineage.audit import audit
from qwen_pipeline.lineage.library import Sources, open_library
from qwen_pipeline.lineage.verification.order import by_digest, prove_order
from qwen_pipeline.lineage.verification.records import RecordedStep
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.qwen.padding_spec import PaddingSpec
from qwen_pipeline.stages.merge import merge
from qwen_pipeline.stages.pad import pad
from qwen_pipeline.stages.quantize import quantize
from qwen_pipeline.workers.environments import MAIN, find_environment
from qwen_pipeline_tests.tiny import tiny_adapter, tiny_qwen2


def step(stage: str, digest: str, inputs: Mapping[str, str]) -> RecordedStep:
    return RecordedStep(stage=stage, content_digest=digest, inputs=inputs, spec={}, code_version="1", key="")


def test_one_digest_of_merged_and_padded_is_in_order_however_they_are_recorded() -> None:
    quantized = step("quantized", "sha256:q", {"source": "sha256:m"})
    others = (step("merged", "sha256:m", {"base": "sha256:b"}), step("padded", "sha256:m", {"source": "sha256:m"}))
    for steps in permutations((quantized, *others)):
        found = prove_order(quantized, by_digest(steps), lambda _: "proven")
        assert {finding.name: finding.verdict for finding in found} == {
            "padding_before_quantization": "proven",
            "merging_before_padding": "proven",
        }
    (wrong,) = prove_order(quantized, by_digest((quantized, others[0])), lambda _: "proven")
    assert (wrong.name, wrong.verdict) == ("padding_before_quantization", "refuted")


def test_an_audit_passes_a_chain_whose_padding_had_nothing_to_add(tmp_path: Path) -> None:
    base, adapter = tiny_qwen2(tmp_path / "base"), tmp_path / "adapter"
    tiny_adapter(base, adapter)
    store = CheckpointStore(tmp_path / "store")
    slot = store.slot("bot")
    merged = merge(base=base, fine_tune=adapter, destination=slot)
    padded = pad(source=merged.path, destination=slot, spec=PaddingSpec(group_size=32, tensor_parallel=1))
    assert padded.manifest.content_digest == merged.manifest.content_digest
    floats = QuantSpec(method="fp8-dynamic")
    quantized = quantize(source=padded.path, destination=slot, spec=floats, engine=find_environment(MAIN))
    result = audit(quantized.path, library=open_library([store.root]), sources=Sources([base, adapter]))
    assert not result.faults
    assert {node.state for node in result.nodes.values()} == {"proven"}
    assert len(result.nodes) == 4

"""A checkpoint that is written while the layer loop runs: the same bytes, layer by layer, and no hanging."""

from itertools import groupby
from pathlib import Path

import pytest

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.writer import write_checkpoint
from qwen_pipeline.quantization.evidence import ModuleEvidence
from qwen_pipeline.quantization.job import QuantJob
from qwen_pipeline.quantization.output.growing_codes import Abandoned, writing_meanwhile
from qwen_pipeline.quantization.output.layer_shards import write_index, write_layer
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.qwen.linears import decoder_linears
from qwen_pipeline.transforms.codes.gptq import CODES
from qwen_pipeline.transforms.codes.packed import quantized_checkpoint
from qwen_pipeline_tests.rounding import round_to_codes
from qwen_pipeline_tests.tiny import tiny_qwen2

SPEC = QuantSpec(engine="layerwise", group_size=32, device="cpu")
CONFIG = SPEC.quantization_config("test:0")


@pytest.fixture
def job(tmp_path: Path) -> QuantJob:
    job = QuantJob(spec=SPEC, source=tiny_qwen2(tmp_path / "s"), windows=tmp_path / "w.npy", work_dir=tmp_path / "work")
    job.packed.mkdir(parents=True)
    (tmp_path / "out").mkdir()
    return job


def write(job: QuantJob, source: Checkpoint, codes: Checkpoint, layer: int) -> None:
    """Write a layer's codes as the loop does."""
    linears = [linear for linear in decoder_linears(source) if linear.layer == layer]
    names = [f"{linear.module}.{code}" for linear in linears for code in CODES]
    rows = [
        ModuleEvidence(module=each.module, layer=layer, kind=each.kind, loss=0.0, tokens=1, damp=0.0, rounded=False)
        for each in linears
    ]
    write_layer(job.packed, layer, {name: codes.load(name) for name in names}, rows, {}, {})


def test_a_checkpoint_written_meanwhile_is_that_written_at_the_end(job: QuantJob, tmp_path: Path) -> None:
    source, out = open_checkpoint(job.source), tmp_path / "out"
    codes, linears = (
        open_checkpoint(round_to_codes(job.source, tmp_path / "codes", group_size=32)),
        decoder_linears(source),
    )
    layers = [layer for layer, _ in groupby(linear.layer for linear in linears)]
    with writing_meanwhile(job, source, linears, CONFIG, out) as writing:
        assert writing
        for layer in layers:
            assert not writing.done()
            write(job, source, codes, layer)
        meanwhile = writing.result(timeout=60)
    write_index(job.packed, len(layers), SPEC)
    (tmp_path / "later").mkdir()
    quantized = quantized_checkpoint(source, open_checkpoint(job.packed), linears, CONFIG)
    assert meanwhile == write_checkpoint(quantized, tmp_path / "later", task="write")
    for name in CODES:
        module = linears[-1].module
        assert open_checkpoint(out).load(f"{module}.{name}").equal(codes.load(f"{module}.{name}"))


def test_a_loop_that_fails_or_continues_leaves_nothing_waiting(job: QuantJob, tmp_path: Path) -> None:
    source = open_checkpoint(job.source)
    arguments = (job, source, decoder_linears(source), CONFIG, tmp_path / "out")
    with pytest.raises(ZeroDivisionError), writing_meanwhile(*arguments) as writing:
        raise ZeroDivisionError
    assert writing
    assert isinstance(writing.exception(timeout=0), Abandoned)
    write(job, source, open_checkpoint(round_to_codes(job.source, tmp_path / "codes", group_size=32)), 1)
    with writing_meanwhile(*arguments) as writing:
        assert writing is None

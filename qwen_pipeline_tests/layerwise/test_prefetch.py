"""Prefetched tensors: equal to the stored ones, in order, within the budget; errors are raised, all threads end."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwen_pipeline.checkpoint.lazy import Checkpoint, LazyTensor, open_checkpoint
from qwen_pipeline.checkpoint.safetensors_file import TensorSpec
from qwen_pipeline.errors import CheckpointRefused
from qwen_pipeline.evaluation.logits.streamed import evaluate
from qwen_pipeline.layerwise.decoding import Decoder
from qwen_pipeline.layerwise.forward import LayerStream
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline.layerwise.prefetch import Prefetcher
from qwen_pipeline_tests.rounding import round_to_codes
from qwen_pipeline_tests.tiny import VOCABULARY, tiny_model

CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WINDOWS = list(torch.randint(0, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0)))


def tensors_of(path: Path) -> tuple[dict[str, torch.Tensor], list[LazyTensor]]:
    """Write tensors of various sizes and dtypes; return them and their lazy tensors."""
    generator = torch.Generator().manual_seed(0)
    written = {
        "large": torch.randn(2500, 2048, generator=generator),  # two blocks and a half
        "half": torch.randn(300, 1000, generator=generator).bfloat16(),
        "codes": torch.randint(-9, 9, (64, 8), generator=generator, dtype=torch.int32),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 7),
        "flag": torch.tensor([True, False, True]),
    }
    save_file(written, path)
    checkpoint = one_file(path)
    return {name: written[name] for name in checkpoint}, list(checkpoint.tensors.values())


def one_file(path: Path) -> Checkpoint:
    (path.parent / "config.json").write_text("{}")
    return open_checkpoint(path.parent)


def readers_left() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "_run_reader" in thread.name]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("budget", [0, 10_000, 10**9])
def test_prefetched_tensors_equal_the_stored_ones(tmp_path: Path, device: str, budget: int) -> None:
    written, tensors = tensors_of(tmp_path / "model.safetensors")
    with Prefetcher(tensors, torch.device(device), budget=budget) as prefetched:
        tensors_read = list(prefetched)
    for (name, expected), tensor in zip(written.items(), tensors_read, strict=True):
        assert tensor.dtype == expected.dtype, name
        assert torch.equal(tensor.cpu(), expected), name
    assert not readers_left()


@pytest.mark.gpu
def test_memory_is_reused_only_after_the_computations_with_it() -> None:
    def ones(number: int) -> LazyTensor:
        spec = TensorSpec(dtype="F32", shape=(4096, 1024))
        return LazyTensor(spec=spec, read=lambda start, stop: torch.full((stop - start, 1024), float(number)))

    count, sums = 60, list[torch.Tensor]()
    matrix = torch.randn(4096, 4096, device="cuda")
    with Prefetcher([ones(number) for number in range(count)], torch.device("cuda"), budget=2**25) as prefetched:
        for tensor in prefetched:
            for _ in range(5):
                torch.mm(matrix, matrix)  # keeps the stream behind what is read
            sums.append(tensor.double().mean())
            del tensor
    assert torch.stack(sums).tolist() == list(map(float, range(count)))


def test_no_more_is_started_than_the_budget_allows() -> None:
    started: list[int] = []

    def tensor(number: int, rows: int) -> LazyTensor:
        def read(start: int, stop: int) -> torch.Tensor:
            started.append(number)
            return torch.zeros(stop - start, 100)

        return LazyTensor(spec=TensorSpec(dtype="F32", shape=(rows, 100)), read=read)

    with Prefetcher([tensor(n, rows) for n, rows in enumerate([10, 10, 10, 1000, 10])], CPU, budget=8000) as prefetched:
        _settle(started, 2)
        for number, expected in enumerate([3, 3, 3]):
            next(prefetched)
            _settle(started, expected)
            assert sorted(started) == list(range(expected)), number
        next(prefetched)  # larger than the budget: it is started because it is requested
        _settle(started, 5)
        assert len(next(prefetched)) == 10
    assert not readers_left()


def _settle(started: Sequence[int], count: int) -> None:
    """Wait until so many are started, and a moment longer, in which one too many would be."""
    deadline = time.monotonic() + 10
    while len(started) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(started) == count


@pytest.mark.parametrize("device", DEVICES)
def test_a_truncated_file_is_refused(tmp_path: Path, device: str) -> None:
    path = tmp_path / "model.safetensors"
    _, tensors = tensors_of(path)
    last = [tensor.spec.nbytes for tensor in tensors if tensor.spec.nbytes][-1]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - last)
    with (
        Prefetcher(tensors, torch.device(device), budget=10**9) as prefetched,
        pytest.raises(CheckpointRefused, match="ends"),
    ):
        list(prefetched)
    assert not readers_left()


def test_leaving_early_ends_all_threads(tmp_path: Path) -> None:
    _, tensors = tensors_of(tmp_path / "model.safetensors")
    with Prefetcher(tensors, CPU, budget=10_000) as prefetched:
        next(prefetched)
    assert not readers_left()
    with Prefetcher([], CPU, budget=1) as prefetched:
        assert list(prefetched) == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_figures_do_not_depend_on_how_layers_are_read(
    family: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {role: open_checkpoint(tiny_model(family, tmp_path / role, seed=seed)) for seed, role in enumerate("pq")}
    require_same_figures(models, device, monkeypatch)


@pytest.mark.parametrize("device", DEVICES)
def test_figures_of_codes_do_not_depend_on_how_layers_are_read(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tiny_model("qwen2", tmp_path / "p")
    codes = round_to_codes(root, tmp_path / "q", group_size=32)
    require_same_figures({"p": open_checkpoint(root), "q": open_checkpoint(codes)}, device, monkeypatch)


@pytest.mark.parametrize("device", DEVICES)
def test_answers_do_not_depend_on_how_layers_are_read(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, answers = open_checkpoint(tiny_model("qwen2", tmp_path / "model")), list[Sequence[tuple[int, ...]]]()
    for has_own_memory in (False, True):
        monkeypatch.setattr(ComputeContext, "has_own_memory", has_own_memory)
        decoder = Decoder(model, ComputeContext(device=torch.device(device), dtype=torch.float32), budget=0)
        answers.append(decoder.answers([[5, 6, 7], [8, 9]], stops=[], limit=4))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("device", DEVICES)
@torch.inference_mode()
def test_weights_of_a_layer_can_be_modified(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ComputeContext, "has_own_memory", True)
    context = ComputeContext(device=torch.device(device), dtype=torch.bfloat16)
    stream = LayerStream(open_checkpoint(tiny_model("qwen2", tmp_path / "model")), [torch.stack(WINDOWS)], context)
    for layer, module in enumerate(stream.iter_layers()):
        module.get_parameter("mlp.up_proj.weight")[:3] = 1
        stream.run(layer, module)
    assert not readers_left()


def require_same_figures(models: dict[str, Checkpoint], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    context, found = ComputeContext(device=torch.device(device), dtype=torch.bfloat16), []
    for has_own_memory in (False, True):
        monkeypatch.setattr(ComputeContext, "has_own_memory", has_own_memory)
        found.append(evaluate(models, WINDOWS, reference="p", compared=["q"], context=context))
    assert found[0] == found[1]

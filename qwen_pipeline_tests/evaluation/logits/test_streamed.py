"""The streamed figures, compared with a plain Transformers computation."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM

from qwen_pipeline.checkpoint.lazy import open_checkpoint
from qwen_pipeline.evaluation.logits.streamed import evaluate
from qwen_pipeline.layerwise.model import ComputeContext
from qwen_pipeline_tests.tiny import LANGUAGE_FAMILIES, VOCABULARY, load_tiny, tiny_model, tiny_qwen2, tiny_qwen3

CPU = ComputeContext(device=torch.device("cpu"), dtype=torch.float32)
WINDOWS = list(torch.randint(0, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(0)))


def test_figures_equal_those_of_plain_transformers(tmp_path: Path) -> None:
    roots = {"p": tiny_qwen2(tmp_path / "p", tie=True), "q": tiny_qwen3(tmp_path / "q", seed=3)}
    models = {role: open_checkpoint(root) for role, root in roots.items()}
    found = evaluate(models, WINDOWS, reference="p", compared=["q"], context=CPU)

    with torch.no_grad():
        plain = {role: AutoModelForCausalLM.from_pretrained(root, dtype=torch.float64) for role, root in roots.items()}
        outputs = {role: model(torch.stack(WINDOWS), output_hidden_states=True) for role, model in plain.items()}
    logits = {role: output.logits[:, :-1].flatten(0, 1) for role, output in outputs.items()}
    targets = torch.cat([window[1:] for window in WINDOWS])
    for role in models:
        assert found[role].perplexity == pytest.approx(cross_entropy(logits[role], targets).exp().item(), rel=1e-4)
        assert found[role].tokens == 3 * 19
    p, q = (logits[role].log_softmax(-1) for role in models)
    kl = kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert found["p"].divergence is None
    assert (divergence := found["q"].divergence)
    assert divergence.mean == pytest.approx(kl.mean().item(), rel=1e-4)
    assert divergence.p95 == pytest.approx(kl.quantile(0.95).item(), rel=1e-4)
    assert divergence.p99_9 == pytest.approx(kl.quantile(0.999).item(), rel=1e-4)
    assert divergence.max == pytest.approx(kl.max().item(), rel=1e-4)
    assert divergence.by_position == pytest.approx(kl.view(3, 19).mean(0).tolist(), rel=1e-4)
    assert [stretch.first for stretch in divergence.stretches] == list(range(19))
    assert [stretch.mean for stretch in divergence.stretches] == pytest.approx(
        kl.view(3, 19).mean(0).tolist(), rel=1e-4
    )
    at_the_end = kl.view(3, 19)[:, -1]
    assert divergence.stretches[-1].p95 == pytest.approx(at_the_end.quantile(0.95).item(), rel=1e-4)
    assert divergence.stretches[-1].median == pytest.approx(at_the_end.median().item(), rel=1e-4)
    assert divergence.top1_agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item()

    after_first = [outputs[role].hidden_states[1] for role in ("q", "p")]
    expected = (after_first[0] - after_first[1]).norm() / after_first[1].norm()
    assert found["q"].drift[0] == pytest.approx(expected.item(), rel=1e-4)
    assert len(found["q"].drift) == 2


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in LANGUAGE_FAMILIES if family not in ("qwen2", "qwen3")])
def test_perplexity_and_kl_of_every_family_equal_those_of_plain_transformers(family: str, tmp_path: Path) -> None:
    roots = {"p": tiny_model(family, tmp_path / "p"), "q": tiny_model(family, tmp_path / "q", seed=3)}
    models = {role: open_checkpoint(root) for role, root in roots.items()}
    found = evaluate(models, WINDOWS, reference="p", compared=["q"], context=CPU)
    with torch.no_grad():
        logits = {
            role: load_tiny(root)(input_ids=torch.stack(WINDOWS)).logits[:, :-1].flatten(0, 1).double()
            for role, root in roots.items()
        }
    targets = torch.cat([window[1:] for window in WINDOWS])
    for role in models:
        assert found[role].perplexity == pytest.approx(cross_entropy(logits[role], targets).exp().item(), rel=1e-4)
    p, q = (logits[role].log_softmax(-1) for role in models)
    assert (divergence := found["q"].divergence)
    assert divergence.mean == pytest.approx(
        kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item(), rel=1e-4
    )


def test_a_model_has_no_distance_from_itself(tmp_path: Path) -> None:
    model = open_checkpoint(tiny_qwen2(tmp_path / "p"))
    found = evaluate({"p": model, "q": model}, WINDOWS, reference="p", compared=["q"], context=CPU)["q"]
    assert found.divergence
    assert found.divergence.max == 0
    assert found.drift == (0, 0)


def test_a_base_with_a_smaller_vocabulary_is_measured_too(tmp_path: Path) -> None:
    model = open_checkpoint(tiny_qwen2(tmp_path / "p"))
    small = open_checkpoint(tiny_qwen2(tmp_path / "base", vocab_size=VOCABULARY - 7))
    windows = [window.clamp(max=300) for window in WINDOWS]
    beside = evaluate({"p": model, "base": small}, windows, reference="p", compared=[], context=CPU)
    alone = evaluate({"base": small}, windows, reference="base", compared=[], context=CPU)
    assert beside["base"] == alone["base"]

"""Calibration sets: the directory, the check of experts, and quantization with the directory or its text."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_pipeline.checkpoint.manifest import open_manifest
from qwen_pipeline.checkpoint.store.destinations import Artifact, Directory
from qwen_pipeline.checkpoint.store.verify import require_intact
from qwen_pipeline.errors import CheckFailed, CheckpointRefused, EnvironmentFault, InputRefused
from qwen_pipeline.evaluation.report.markdown import skipped_records
from qwen_pipeline.quantization.calibration.calibration_set import FILE, draw_calibration, is_prepared, load_calibration
from qwen_pipeline.quantization.calibration.spec import CalibrationSpec
from qwen_pipeline.quantization.spec import QuantSpec
from qwen_pipeline.reports import load_reports
from qwen_pipeline.stages.calibrate import EXPERT_TABLE, PLOT, calibrate, check_experts
from qwen_pipeline.stages.quantize import quantize
from qwen_pipeline.text.reading import RecordUse
from qwen_pipeline.text.spec import TextSpec
from qwen_pipeline.workers.environments import WorkerEnvironment
from qwen_pipeline_tests.chain import write_text
from qwen_pipeline_tests.tiny import tiny_model, tiny_qwen2, tiny_tokenizer

SPEC = CalibrationSpec(samples=4, seq_len=32, seed=3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl", documents=12, stride=7)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("dense"), intermediate_size=128)


@pytest.fixture(scope="module")
def prepared(dense: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("prepared") / "out"
    return calibrate(source=dense, text=text, destination=Directory(out), spec=SPEC)


def test_the_directory_equals_a_direct_draw(prepared: Artifact, dense: Path, text: Path) -> None:
    drawn = draw_calibration(text, dense, SPEC)
    kept = load_calibration(prepared.path)
    assert is_prepared(prepared.path)
    assert prepared.manifest.content_digest == drawn.digest == kept.digest
    assert (kept.spec, kept.lengths) == (SPEC, drawn.lengths)
    assert prepared.manifest.result["statistics"] == drawn.statistics() == kept.statistics()
    assert (prepared.path / PLOT).read_bytes().startswith(b"\x89PNG")
    used, experts = load_reports(prepared.manifest.result)
    assert (used.outcome, used.measured) == ("passed", f"{len(drawn.lengths)} of {len(drawn.lengths)}")
    assert (experts.outcome, experts.detail) == ("skipped", "The model has no experts.")
    require_intact(prepared.path)


def test_a_finished_directory_is_reused(prepared: Artifact, dense: Path, text: Path) -> None:
    assert calibrate(source=dense, text=text, destination=Directory(prepared.path), spec=SPEC).reused


def test_the_tokens_do_not_depend_on_the_weights(prepared: Artifact, text: Path, tmp_path: Path) -> None:
    other = tiny_qwen2(tmp_path / "other", intermediate_size=128, seed=5)
    again = calibrate(source=other, text=text, destination=Directory(tmp_path / "out"), spec=SPEC)
    assert again.manifest.derivation.key != prepared.manifest.derivation.key
    assert again.manifest.content_digest == prepared.manifest.content_digest


def test_the_chat_template_is_that_of_the_fine_tune(dense: Path, tmp_path: Path) -> None:
    talks = tmp_path / "talks.jsonl"
    talks.write_text(
        "\n".join(json.dumps({"messages": [{"role": "user", "content": "Hello " * 40}]}) for _ in range(4))
    )
    other = tiny_qwen2(tmp_path / "other", intermediate_size=128)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    tokenizer.save_pretrained(other)
    own, others = (
        calibrate(source=root, text=talks, destination=Directory(tmp_path / name), spec=SPEC).path
        for name, root in (("a", dense), ("b", other))
    )
    begins = [str(tokenizer.decode(load_calibration(path).input_ids[0]))[:12] for path in (own, others)]
    assert begins == ["<|im_start|>", "[Hello Hello"]


def test_skipped_records_are_counted_named_and_warned_of(dense: Path, tmp_path: Path) -> None:
    records: list[dict[str, object]] = [{"text": f"A record of some length, number {n}."} for n in range(40)]
    records[7] = {"text": "half \ud83d"}
    records[9] = {"text": ""}
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(map(json.dumps, records)))
    spec = replace(SPEC, samples=42)
    path = calibrate(source=dense, text=text, destination=Directory(tmp_path / "out"), spec=spec).path
    manifest, drawn = open_manifest(path), load_calibration(path)
    report, _ = load_reports(manifest.result)
    assert report.outcome == "warning"
    assert report.measured == "38 of 39"
    assert f"{text.name} line 8: has half of a surrogate pair" in report.detail
    assert manifest.result["records"] == drawn.records.to_json() == drawn.statistics()["skipped"]
    assert (drawn.records.empty, drawn.records.skipped) == (1, {"has half of a surrogate pair": 1})
    again = calibrate(source=dense, text=text, destination=Directory(path), spec=spec)
    assert again.reused
    with pytest.raises(InputRefused, match=r"more than max_skipped = 0\.01: 1 of"):
        calibrate(source=dense, text=text, destination=tmp_path / "b", spec=spec, text_spec=TextSpec(max_skipped=0.01))
    assert not (tmp_path / "b").exists()


def test_a_report_names_the_skipped_records_of_both_texts(prepared: Artifact, tmp_path: Path) -> None:
    calibration, held_out = RecordUse(used=9, skipped={"is empty-handed": 1}, first=("a line 1",)), RecordUse(used=3)
    copy = tmp_path / "copy"
    shutil.copytree(prepared.path, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    assert skipped_records(held_out, copy) == skipped_records(held_out, tmp_path) == ""
    manifest["result"]["calibration"] = {"skipped": calibration.to_json()}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert skipped_records(held_out, copy) == (
        " Of the calibration text, 1 of 10 records were skipped: 1 (is empty-handed). The first: a line 1."
    )
    assert skipped_records(calibration, tmp_path).startswith(" Of the held-out text, 1 of 10")


def test_arguments_of_the_template_are_part_of_the_derivation(dense: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(dense, model)
    (model / "chat_template.jinja").write_text("{{ tone }}{{ messages[0].content }}")
    talks = tmp_path / "talks.jsonl"
    talks.write_text(json.dumps({"messages": [{"role": "user", "content": "Hello " * 40}]}))
    plain, kind = (
        calibrate(source=model, text=talks, destination=tmp_path / name, spec=SPEC, text_spec=text_spec)
        for name, text_spec in (("plain", TextSpec()), ("kind", TextSpec(template_arguments={"tone": "kind"})))
    )
    assert plain.manifest.derivation.key != kind.manifest.derivation.key
    assert str(tiny_tokenizer().decode(load_calibration(kind.path).input_ids[0])).startswith("kindHello")


def test_tokens_without_a_row_are_refused(tmp_path: Path) -> None:
    model = tiny_qwen2(tmp_path / "model", vocab_size=258)
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": "some words " * 9}) for _ in range(4)))
    with pytest.raises(InputRefused, match="has token 258, but the model's embedding has 258 rows"):
        calibrate(source=model, text=text, destination=tmp_path / "out", spec=SPEC)


@pytest.mark.parametrize("damage", [{"lengths": None}, {"lengths": ["a"]}, {"records": {"used": "x"}}, {"records": 5}])
def test_a_damaged_manifest_is_refused(prepared: Artifact, damage: dict[str, object], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(prepared.path, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["result"] |= damage
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointRefused, match="damaged"):
        load_calibration(copy)


def test_damaged_tokens_are_refused(dense: Path, text: Path, tmp_path: Path) -> None:
    path = calibrate(source=dense, text=text, destination=Directory(tmp_path / "out"), spec=SPEC).path
    content = bytearray((path / FILE).read_bytes())
    content[-1] ^= 1
    (path / FILE).write_bytes(content)
    with pytest.raises(CheckpointRefused, match="does not match its manifest"):
        load_calibration(path)


def test_quantizing_with_the_directory_or_its_text_is_the_same_derivation(
    prepared: Artifact, dense: Path, text: Path, tmp_path: Path
) -> None:
    """The spec of the directory replaces the default; both runs fail at the same point, the missing environment."""
    nothing = WorkerEnvironment(name="gptqmodel", python=Path("/nowhere/python"))
    spec = QuantSpec(group_size=32, samples=4, seq_len=32, seed=3)
    for calibration, own_spec in ((prepared.path, QuantSpec(group_size=32)), (text, spec)):
        with pytest.raises(EnvironmentFault, match="nowhere"):
            quantize(
                source=dense, destination=Directory(tmp_path / "out"), calibration=calibration, spec=own_spec,
                engine=nothing,
            )  # fmt: skip


class TestExperts:
    """Routing of the calibration tokens, counted before anything is quantized."""

    @pytest.fixture
    def mixture(self, tmp_path: Path) -> Path:
        return tiny_model("qwen3_moe", tmp_path / "mixture")

    @pytest.mark.slow
    def test_starved_experts_fail_the_check_and_the_directory_is_refused(
        self, mixture: Path, text: Path, tmp_path: Path
    ) -> None:
        artifact = calibrate(
            source=mixture, text=text, destination=Directory(tmp_path / "out"), spec=SPEC, min_expert_tokens=10_000
        )
        _, report = load_reports(artifact.manifest.result)
        assert report.blocks
        assert "8 of 8 experts get fewer than 10000 tokens" in report.detail
        assert "more samples" in report.detail
        assert "all experts" in report.detail
        rows = (artifact.path / EXPERT_TABLE).read_text().splitlines()[1:]
        assert sum(int(row.split(",")[2]) for row in rows) == 2 * 2 * SPEC.samples * SPEC.seq_len
        with pytest.raises(CheckFailed, match="experts_reached"):
            load_calibration(artifact.path)

    def test_all_experts_needs_no_routing(self, mixture: Path, text: Path, tmp_path: Path) -> None:
        artifact = calibrate(
            source=mixture, text=text, destination=Directory(tmp_path / "out"), spec=SPEC, all_experts=True,
            min_expert_tokens=10_000,
        )  # fmt: skip
        _, report = load_reports(artifact.manifest.result)
        assert report.passed
        assert report.detail == "Every expert will get every token."

    def test_the_expert_with_the_fewest_tokens_is_named_first(self) -> None:
        report = check_experts({0: [200, 5], 3: [0, 128]}, 128)
        assert not report.passed
        assert report.measured == 0
        assert report.detail.index("layer 3 expert 0 gets 0") < report.detail.index("layer 0 expert 1 gets 5")
        assert check_experts({0: [200, 128]}, 128).passed

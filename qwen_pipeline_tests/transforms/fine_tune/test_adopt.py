"""A full fine-tune takes the base's spelling and layout, and Transformers reads the same model from it."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_pipeline.checkpoint.lazy import Checkpoint, open_checkpoint
from qwen_pipeline.checkpoint.writer import write_checkpoint
from qwen_pipeline.errors import CheckpointRefused, QuantizedInputRefused
from qwen_pipeline.qwen.families import text_config
from qwen_pipeline.transforms.fine_tune.adopt import adopt
from qwen_pipeline_tests.in_memory import blocks_of, read_in_blocks
from qwen_pipeline_tests.layouts import Layout, layouts_of
from qwen_pipeline_tests.oracles import language_logits
from qwen_pipeline_tests.tiny import (
    LANGUAGE_FAMILIES,
    VOCABULARY,
    load_tiny,
    tiny_model,
    tiny_qwen2,
    tiny_qwen3,
    with_codes,
)

PAIRS = [
    pytest.param(family, base, own, marks=[pytest.mark.slow] * (base != layouts_of(family)[0]))
    for family in LANGUAGE_FAMILIES
    for base in layouts_of(family)
    for own in layouts_of(family)
    if own not in (base, "mtp")
]
"""Every pair of layouts; those of a base in another than its family's first layout are slow."""
BASE, TUNED = 0, 5
"""Seeds of the weights."""


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> "Models":
    return Models(tmp_path_factory.mktemp("models"))


class Models:
    """Tiny models by family, layout and seed, each made once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._states: dict[str, Mapping[str, torch.Tensor]] = {}

    def directory(self, family: str, layout: Layout, seed: int) -> Path:
        root = self._root / f"{family}-{layout}-{seed}"
        return root if root.exists() else tiny_model(family, root, layout=layout, seed=seed)

    def opened(self, family: str, layout: Layout, seed: int) -> Checkpoint:
        return open_checkpoint(self.directory(family, layout, seed))

    def tuned(self, family: str) -> Mapping[str, torch.Tensor]:
        """Return the weights of the fine-tune, as Transformers loads them from what it saved."""
        if family not in self._states:
            self._states[family] = load_tiny(self.directory(family, "saved", TUNED), torch.float64).state_dict()
        return self._states[family]


def written(checkpoint: Checkpoint, root: Path) -> Path:
    root.mkdir()
    write_checkpoint(checkpoint, root, task="test")
    return root


@pytest.mark.parametrize(("family", "base", "own"), PAIRS)
def test_every_layout_is_adopted_into_every_other(
    family: str, base: Layout, own: Layout, roots: Models, tmp_path: Path
) -> None:
    parent, child = roots.opened(family, base, BASE), roots.opened(family, own, TUNED)
    adopted = adopt(parent, child)
    assert {name: spec.shape for name, spec in adopted.checkpoint.items()} == {n: s.shape for n, s in parent.items()}
    assert adopted.checkpoint.shards == parent.shards
    assert adopted.respelled or adopted.carried

    theirs, expected = load_tiny(written(adopted.checkpoint, tmp_path / "out"), torch.float64), roots.tuned(family)
    assert theirs.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in theirs.state_dict().items())
    drafts = [name for name in parent if name.startswith("mtp.")]
    assert dict(adopted.carried) == ({"mtp": len(drafts)} if drafts else {})
    assert all(torch.equal(adopted.checkpoint.load(name), parent.load(name)) for name in drafts)


def with_whole_table(sharded: Path, root: Path) -> Path:
    """Copy a model with the shards of its n-gram table as one tensor."""
    shutil.copytree(sharded, root)
    tensors = load_file(root / "model.safetensors")
    shards = sorted(name for name in tensors if ".ngram_embedding.shard_" in name)
    assert len(shards) == 2
    table = torch.cat([tensors.pop(name) for name in shards])
    save_file({**tensors, shards[0].replace(".shard_0", ""): table}, root / "model.safetensors")
    return root


def test_a_table_of_n_grams_is_adopted_in_shards_and_as_a_whole(roots: Models, tmp_path: Path) -> None:
    sharded = {seed: roots.directory("qwen4_exp", "saved", seed) for seed in (BASE, TUNED)}
    whole = {seed: with_whole_table(root, tmp_path / str(seed)) for seed, root in sharded.items()}
    for base, own, expected in (
        (sharded[BASE], whole[TUNED], sharded[TUNED]),
        (whole[BASE], sharded[TUNED], whole[TUNED]),
    ):
        adopted = adopt(open_checkpoint(base), open_checkpoint(own)).checkpoint
        tensors = load_file(expected / "model.safetensors")
        assert adopted.tensors.keys() == tensors.keys()
        assert all(torch.equal(adopted.load(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_vl_moe"])
def test_adopted_experts_have_the_same_bytes_in_blocks_of_any_size(family: str, roots: Models) -> None:
    layouts = layouts_of(family)
    for base in layouts:
        for own in layouts:
            adopted = adopt(roots.opened(family, base, BASE), roots.opened(family, own, TUNED)).checkpoint
            for name in adopted:
                with blocks_of(adopted[name].row_bytes):
                    assert torch.equal(read_in_blocks(adopted, name), adopted.load(name))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen3_5", "qwen2_5_vl", "qwen2_5_omni_thinker"])
def test_logits_of_an_adopted_model_are_those_of_the_fine_tune(family: str, roots: Models, tmp_path: Path) -> None:
    base = layouts_of(family)[1]
    tuned = roots.directory(family, "saved", TUNED)
    adopted = adopt(roots.opened(family, base, BASE), open_checkpoint(tuned)).checkpoint
    ours, theirs = (
        language_logits(load_tiny(root, torch.float64)) for root in (written(adopted, tmp_path / "out"), tuned)
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", LANGUAGE_FAMILIES)
@pytest.mark.parametrize("tie", [False, True])
def test_a_fine_tune_in_the_spelling_of_the_base_is_unchanged(family: str, tie: bool, tmp_path: Path) -> None:
    base, tuned = (
        open_checkpoint(tiny_model(family, tmp_path / str(seed), tie=tie, seed=seed)) for seed in (BASE, TUNED)
    )
    adopted = adopt(base, tuned)
    assert adopted.checkpoint is tuned
    assert not (adopted.respelled)
    assert not (adopted.carried)
    assert not (adopted.remarks)
    assert not adopted.settled.remarks


def test_the_shards_and_the_dtype_of_the_fine_tune_are_kept_where_names_agree(tmp_path: Path) -> None:
    base = open_checkpoint(tiny_qwen2(tmp_path / "base", shards=3))
    tuned = open_checkpoint(tiny_qwen2(tmp_path / "tuned", seed=TUNED, dtype=torch.float32))
    assert adopt(base, tuned).checkpoint is tuned


def test_a_draft_head_that_the_base_lacks_is_refused(roots: Models) -> None:
    with pytest.raises(CheckpointRefused, match=r"mtp\.\S+ is not in the base"):
        adopt(roots.opened("qwen3_5", "saved", BASE), roots.opened("qwen3_5", "mtp", TUNED))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.layers.1.mlp.experts.2.up_proj.weight", r"layer 1 are missing: mlp\.experts\.2\.up_proj"),
        ("model.layers.1.mlp.gate.weight", r"model\.layers\.1\.mlp\.gate\.weight is missing"),
        ("model.norm.weight", r"model\.norm\.weight is missing"),
        ("mtp.norm.weight", r"mtp\.norm\.weight is missing"),
        ("model.embed_tokens.weight", "no embedding"),
    ],
)
def test_a_part_that_is_incomplete_is_refused_by_name(missing: str, message: str, roots: Models) -> None:
    tuned = roots.opened("qwen3_next", "mtp", TUNED)
    base = roots.opened("qwen3_next", "fused" if "experts" in missing else "mtp", BASE)
    if "experts" in missing:
        tuned = roots.opened("qwen3_next", "saved", TUNED)
    with pytest.raises(CheckpointRefused, match=message):
        adopt(base, tuned.without([missing]))


def test_experts_that_one_stack_cannot_hold_are_refused(tmp_path: Path) -> None:
    base = open_checkpoint(tiny_model("qwen3_moe", tmp_path / "base", layout="fused"))
    root = tiny_model("qwen3_moe", tmp_path / "tuned", seed=TUNED)
    tensors, name = load_file(root / "model.safetensors"), "model.layers.0.mlp.experts.1.up_proj.weight"
    save_file(tensors | {name: tensors[name].float()}, root / "model.safetensors")
    with pytest.raises(CheckpointRefused, match=r"experts\.1\.up_proj\.weight is F32"):
        adopt(base, open_checkpoint(root))


def test_two_spellings_of_one_tensor_are_refused(roots: Models) -> None:
    base, tuned = roots.opened("qwen3_moe", "saved", BASE), roots.opened("qwen3_moe", "saved", TUNED)
    stack = roots.opened("qwen3_moe", "fused", TUNED).tensors["model.layers.0.mlp.experts.down_proj"]
    twice = tuned.with_tensor("model.layers.0.mlp.experts.down_proj", stack, after="model.norm.weight")
    with pytest.raises(CheckpointRefused, match=r"experts\.down_proj is not in the base"):
        adopt(base, twice)
    bare = tuned.with_tensor("norm.weight", tuned.tensors["model.norm.weight"], after="model.norm.weight")
    with pytest.raises(CheckpointRefused, match="two spellings"):
        adopt(base, bare)


def test_a_model_of_another_depth_width_or_family_is_refused_by_name(tmp_path: Path) -> None:
    base = open_checkpoint(tiny_qwen2(tmp_path / "base"))
    deeper = open_checkpoint(tiny_qwen2(tmp_path / "deeper", num_hidden_layers=3))
    wider = open_checkpoint(tiny_qwen2(tmp_path / "wider", intermediate_size=128))
    other = open_checkpoint(tiny_qwen3(tmp_path / "other"))
    with pytest.raises(CheckpointRefused, match=r"model\.layers\.2\.\S+ is not in the base"):
        adopt(base, deeper)
    with pytest.raises(CheckpointRefused, match=r"model\.layers\.2\.\S+ is missing"):
        adopt(deeper, base)
    with pytest.raises(CheckpointRefused, match=r"up_proj\.weight is \[128, 64\], but \[96, 64\] in the base"):
        adopt(base, wider)
    with pytest.raises(CheckpointRefused, match="its model_type is qwen3, but the base's is qwen2"):
        adopt(base, other)


@pytest.mark.parametrize(
    "sizes",
    [{"num_key_value_heads": 1}, {"num_attention_heads": 8}, {"hidden_size": 128}, {"intermediate_size": 100},
     {"head_dim": 8}],
)  # fmt: skip
def test_sizes_of_the_config_that_are_not_those_of_the_weights_are_refused(
    sizes: dict[str, int], roots: Models
) -> None:
    base, tuned = roots.opened("qwen3", "saved", BASE), roots.opened("qwen3", "saved", TUNED)
    with pytest.raises(CheckpointRefused, match=r"do not match its config: model\.layers\.0\."):
        adopt(base, tuned.replace(config={**tuned.config, **sizes}))


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "_fsdp_wrapped_module.", "layers.0._orig_mod."])
def test_names_in_the_wrappers_of_a_training_are_taken(wrapper: str, roots: Models) -> None:
    base, tuned = roots.opened("qwen3", "saved", BASE), roots.opened("qwen3", "saved", TUNED)
    names = {name: name.replace("layers.0.", wrapper) if "layers" in wrapper else wrapper + name for name in tuned}
    adopted = adopt(base, tuned.renamed(names))
    assert adopted.respelled == sum(name != wrapped for name, wrapped in names.items() if name != "lm_head.weight")
    assert adopted.checkpoint.tensors == tuned.tensors
    both = tuned.renamed(names).with_tensor(
        "norm.weight", tuned.tensors["model.norm.weight"], after=names["model.norm.weight"]
    )
    with pytest.raises(CheckpointRefused, match="two spellings"):
        adopt(base, both)
    unmerged = tuned.renamed({name: name.replace("q_proj.", "q_proj.base_layer.") for name in tuned})
    with pytest.raises(CheckpointRefused, match="belongs to an adapter that was not merged"):
        adopt(base, unmerged)


def test_a_quantized_fine_tune_is_refused(tmp_path: Path) -> None:
    base, quantized = tiny_qwen2(tmp_path / "base"), with_codes(tiny_qwen2(tmp_path / "quantized"))
    with pytest.raises(QuantizedInputRefused, match=r"up_proj\.qweight, I32"):
        adopt(open_checkpoint(base), open_checkpoint(quantized))


@pytest.mark.parametrize(("family", "tie"), [("qwen2", True), ("qwen3_vl", False), ("qwen2_5_omni_thinker", True)])
def test_a_vocabulary_may_be_resized(tmp_path: Path, family: str, tie: bool) -> None:
    root = tiny_model(family, tmp_path / "base", tie=tie)
    base, vocabulary = open_checkpoint(root), ("embed_tokens.weight", "lm_head.weight")
    model = load_tiny(root)
    for rows in (VOCABULARY + 10, VOCABULARY - 10):
        model.resize_token_embeddings(rows, mean_resizing=False)
        model.save_pretrained(tmp_path / str(rows))
        resized = open_checkpoint(tmp_path / str(rows))
        assert {resized[name].rows for name in resized if name.endswith(vocabulary)} == {rows}
        adopted = adopt(base, resized)
        assert adopted.checkpoint is resized
        assert adopted.is_resized
        stale = adopt(base, resized.replace(config=base.config))
        assert text_config(stale.checkpoint.config)["vocab_size"] == rows
        assert "vocab_size" in stale.settled.corrections[0]


def test_a_stack_of_experts_without_three_axes_is_refused(tmp_path: Path) -> None:
    base = open_checkpoint(tiny_model("qwen3_moe", tmp_path / "base"))
    root = tiny_model("qwen3_moe", tmp_path / "tuned", seed=TUNED, layout="fused")
    tensors, name = load_file(root / "model.safetensors"), "model.layers.0.mlp.experts.down_proj"
    save_file(tensors | {name: tensors[name][0].clone()}, root / "model.safetensors")
    with pytest.raises(CheckpointRefused, match=r"down_proj is \[64, 96\], but a stack of experts has three axes"):
        adopt(base, open_checkpoint(root))

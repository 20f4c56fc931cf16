"""Code for a model card that loads a release with Transformers or sentence-transformers, by the kind of its head."""

from collections.abc import Mapping

from qwen_pipeline.evaluation.heads import HeadTask
from qwen_pipeline.qwen.heads import HeadKind

PIPELINE_TAGS: Mapping[HeadKind, str] = {
    "language": "text-generation",
    "sequence": "text-classification",
    "token": "token-classification",
    "embedding": "feature-extraction",
}
"""Kind of head -> the hub's name of its task."""
_PACKAGES: Mapping[str, str] = {
    "gptq": "optimum gptqmodel",
    "fp8": "accelerate",
    "compressed-tensors": "accelerate compressed-tensors",
}
"""The ``quant_method`` of a config -> the packages that Transformers needs besides itself."""
_LOAD = """# pip install transformers {packages}
from transformers import {auto}, AutoTokenizer

path = "{name}"  # this directory, or the Hub id after an upload
tokenizer = AutoTokenizer.from_pretrained(path)
model = {auto}.from_pretrained(path, device_map="auto")
"""
_GENERATE = """chat = [{"role": "user", "content": "What is the capital of France?"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs.to(model.device), max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
_SCORE = """inputs = tokenizer("The capital of France is Paris.", return_tensors="pt")
logits = model(**inputs.to(model.device)).logits
print(logits, model.config.id2label)"""
_EMBED = """inputs = tokenizer("The capital of France is Paris.", return_tensors="pt")
print(model(**inputs.to(model.device)).last_hidden_state)  # pooling: {pooling}"""
_CODE: Mapping[HeadKind, tuple[str, str]] = {
    "language": ("AutoModelForCausalLM", _GENERATE),
    "sequence": ("AutoModelForSequenceClassification", _SCORE),
    "token": ("AutoModelForTokenClassification", _SCORE),
    "embedding": ("AutoModel", _EMBED),
}


def loading_code(name: str, task: HeadTask, quant_method: str = "gptq") -> str:
    """Return a Markdown block that loads the release ``name`` and runs it once."""
    auto, run = _CODE[task.kind]
    run = run.replace("{pooling}", ", ".join(task.pooling))
    return f"```python\n{_LOAD.format(auto=auto, name=name, packages=_PACKAGES[quant_method])}{run}\n```"

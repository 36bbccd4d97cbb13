"""The lines of Python that use a published model, by what it does and whether it is an adapter."""

from __future__ import annotations

import json

from model_cards.metadata import is_adapter, repo
from trainworks.record import RunRecord

__all__ = ["usage"]

_PIPELINE = """\
from transformers import pipeline

model = pipeline({tag}, model={model})
print(model({example}))"""

_CHAT = """\
from transformers import pipeline

chat = pipeline("text-generation", model={model})
answer = chat([{{"role": "user", "content": {example}}}], max_new_tokens=200)
print(answer[0]["generated_text"][-1]["content"])"""

_ADAPTER_GENERATION = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({model})
model = AutoPeftModelForCausalLM.from_pretrained({model})
prompt = tokenizer({example}, return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=200)[0], skip_special_tokens=True))"""

_ADAPTER_CHAT = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({model})
model = AutoPeftModelForCausalLM.from_pretrained({model})
messages = [{{"role": "user", "content": {example}}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=200)[0], skip_special_tokens=True))"""

_ADAPTER_CLASSIFICATION = """\
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({model})
model = AutoPeftModelForSequenceClassification.from_pretrained({model}, num_labels={num_labels})
scores = model(**tokenizer({example}, return_tensors="pt")).logits.{chances}
print(dict(zip({labels}, scores[0].tolist())))"""

# transformers 5 has no pipeline for text to text.
_TEXT_TO_TEXT = """\
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({model})
model = AutoModelForSeq2SeqLM.from_pretrained({model})
given = tokenizer({example}, return_tensors="pt")
said = model.generate(input_ids=given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=200)
print(tokenizer.decode(said[0], skip_special_tokens=True))"""

_ADAPTER_TEXT_TO_TEXT = _TEXT_TO_TEXT.replace(
    "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer",
    "from peft import AutoPeftModelForSeq2SeqLM\nfrom transformers import AutoTokenizer",
).replace("= AutoModelFor", "= AutoPeftModelFor")

_TOKENS = """\
from transformers import pipeline

model = pipeline({tag}, model={model}, aggregation_strategy="first")
print(model({example}))"""

_ADAPTER_TOKENS = """\
from peft import AutoPeftModelForTokenClassification
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({model})
model = AutoPeftModelForTokenClassification.from_pretrained({model}, num_labels={num_labels})
given = tokenizer({example}, return_tensors="pt")
tags = model(**given).logits[0].argmax(-1).tolist()
labels = {labels}
print(list(zip(tokenizer.convert_ids_to_tokens(given["input_ids"][0]), [labels[tag] for tag in tags])))"""

# transformers 5 has no pipeline for question answering.
_ANSWERS = """\
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({model})
model = AutoModelForQuestionAnswering.from_pretrained({model})
question = {example}
context = "The text in which the answer stands."
given = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
places = given.pop("offset_mapping")[0].tolist()
scores = model(**given)
inside = [token for token, which in enumerate(given.sequence_ids(0)) if which == 1]
spans = [(start, end) for start in inside for end in inside if start <= end < start + 30]
start, end = max(spans, key=lambda span: scores.start_logits[0, span[0]] + scores.end_logits[0, span[1]])
print(context[places[start][0] : places[end][1]])"""

_ADAPTER_ANSWERS = _ANSWERS.replace(
    "from transformers import AutoModelForQuestionAnswering, AutoTokenizer",
    "from peft import AutoPeftModelForQuestionAnswering\nfrom transformers import AutoTokenizer",
).replace("= AutoModelFor", "= AutoPeftModelFor")

_WHOLE = {
    "question-answering": _ANSWERS,
    "token-classification": _TOKENS,
    **dict.fromkeys(("summarization", "translation"), _TEXT_TO_TEXT),
}
"""For tasks that transformers' pipeline does not do, or not in the way that they are trained."""
_ADAPTERS = {
    "question-answering": _ADAPTER_ANSWERS,
    "text-classification": _ADAPTER_CLASSIFICATION,
    "text-generation": _ADAPTER_GENERATION,
    "token-classification": _ADAPTER_TOKENS,
    **dict.fromkeys(("summarization", "translation"), _ADAPTER_TEXT_TO_TEXT),
}
_NAMED = (_ADAPTER_CLASSIFICATION, _ADAPTER_TOKENS)
"""Those that need the names of the classes."""
_EXAMPLES = {
    "question-answering": "Where does the answer stand?",
    "text-classification": "A fine film.",
    "text-generation": "Once upon a time",
    "token-classification": "Ada Lovelace was born in London.",
    **dict.fromkeys(("image-classification", "image-segmentation", "object-detection"), "image.jpg"),
}
_CHATS = ("sft", "preference")
"""Tasks whose models answer through a chat template."""
_QUESTION = "What can you tell me about yourself?"
_LONGEST_EXAMPLE = 200


def usage(record: RunRecord) -> str:
    """Return the section; adapters of tasks without a snippet of their own have none."""
    chat, adapter = record.task in _CHATS, is_adapter(record)
    tag = record.pipeline_tag
    plain = _ADAPTERS.get(tag) if adapter else _WHOLE.get(tag, _PIPELINE)
    template = (_ADAPTER_CHAT if adapter else _CHAT) if chat else plain
    labels = _labels(record)
    if template is None or (template in _NAMED and not labels):
        return ""
    code = template.format(
        tag=_literal(tag),
        model=_literal(repo(record) or "."),
        example=_literal(_example(record)),
        num_labels=len(labels),
        labels=_literal(labels),
        chances="sigmoid()" if _has_several(record) else "softmax(-1)",
    )
    where = (
        ""
        if repo(record)
        else "Run where this page's files lie; once published, the model's Hub name replaces the dot.\n\n"
    )
    return f"## Use\n\n{where}```python\n{code}\n```"


def _has_several(record: RunRecord) -> bool:
    """Tell whether a row has several classes, each with a probability of its own."""
    return record.final is not None and "subset_accuracy" in record.final.metrics


def _labels(record: RunRecord) -> list[str]:
    """Return the class names in the order of the model's outputs, as the prepared training split has them."""
    return [label for split in record.data.splits[:1] for label in split.labels]


def _example(record: RunRecord) -> str:
    if record.task in _CHATS:  # its recorded prompts hold the chat template's words already
        return _QUESTION
    final = record.final
    prompts = [sample.prompt for sample in final.samples] if final else []
    short = [prompt for prompt in prompts if 0 < len(prompt) <= _LONGEST_EXAMPLE]
    return short[0] if short else _EXAMPLES.get(record.pipeline_tag, "")


def _literal(value: str | list[str]) -> str:
    """Return a Python literal that can neither close the code block nor be read as HTML."""
    return json.dumps(value).replace("`", "\\u0060").replace("<", "\\u003c").replace("&", "\\u0026")

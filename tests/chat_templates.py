"""Chat templates of every style: plain, with generation marked, stripping earlier thoughts, and broken ones."""

from __future__ import annotations

from typing import Any

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (
    "{% set ns = namespace(asked=-1) %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for message in messages %}"
    "{% set said = message['content'] %}"
    "{% if message['role'] == 'assistant' %}"
    "{% set answer = said.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in said else '' %}"
    "{% set said = '<think>\n' + thought + '\n</think>\n\n' + answer if loop.index0 > ns.asked else answer %}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + said + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen3's: thoughts stand before the answers to the last question only."""
COUNTING = "{% for message in messages %}{{ loop.revindex }}{{ message['content'] }}{% endfor %}"
"""Every turn is written otherwise once another follows."""
FORCED = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
"""The model is given the beginning of a thought that no turn has."""


def with_template(tokenizer: Any, template: str) -> Any:
    """Return a copy of a tokenizer with another chat template."""
    import copy

    copied = copy.deepcopy(tokenizer)
    copied.chat_template = template
    return copied

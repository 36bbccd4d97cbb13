"""The tokenizer's own chat template: from messages to token ids and a mask of what is learned, derived and verified."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainworks.data.conversations import Dialogue, Message
from trainworks.errors import DataError

__all__ = ["Agreement", "Conversation", "agreement", "answer_ends", "encode_dialogues"]

Ids = NDArray[np.int32]
Tokenizer = Any
Span = tuple[int, int]

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MEND = "name a template that does as a .jinja file in task.template"


class Conversation(NamedTuple):
    """One conversation as tokens: `input_ids` [length] and, of the same shape, which of them are learned."""

    input_ids: Ids
    trained: NDArray[np.bool_]

    def cut(self, start: int, stop: int) -> Conversation:
        """Return some of its tokens."""
        return Conversation(self.input_ids[start:stop], self.trained[start:stop])


class _Prefix(NamedTuple):
    """The beginning of a dialogue, to be rendered by itself."""

    row: int
    messages: list[Message]
    tools: list[dict[str, Any]] | None


def encode_dialogues(dialogues: Sequence[Dialogue], tokenizer: Tokenizer) -> list[Conversation]:
    """Return each dialogue's tokens, those `apply_chat_template` makes of it, and the mask of its learned turns.

    Where the template has `{% generation %}`, that says what is learned. Otherwise a turn stands between the
    conversation up to it with the generation prompt and the conversation through it, each rendered by itself; the end
    token is learned, blanks that a template puts behind it are not. A token that holds some of an answer is learned.
    DataError names row and turn where the template fails, or where its renderings do not continue one another.
    """
    texts = _rendered([_Prefix(dialogue.row, dialogue.messages, dialogue.tools) for dialogue in dialogues], tokenizer)
    find = _marked if _has_generation(tokenizer) else _derived
    spans = find(dialogues, texts, tokenizer)
    encodings = _tokens(texts, tokenizer)
    return [
        Conversation(np.array(encoding.ids, dtype=np.int32), _mask(encoding, text, learned))
        for encoding, text, learned in zip(encodings, texts, spans, strict=True)
    ]


def _has_generation(tokenizer: Tokenizer) -> bool:
    """Tell whether the template marks what is generated; where there is a second one for tools, whether both do, so
    that it does not depend on a row's neighbours."""
    kinds: tuple[list[dict[str, Any]] | None, ...] = (None, [{}])
    return all(_GENERATION.search(tokenizer.get_chat_template(None, tools)) for tools in kinds)


def _tokens(texts: Sequence[str], tokenizer: Tokenizer) -> Sequence[Any]:
    """Tokenize rendered texts, many at once; the template has written every special token already."""
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return encoded.encodings if texts else []


def _rendered(prefixes: Sequence[_Prefix], tokenizer: Tokenizer, *, prompt: bool = False) -> list[str]:
    """Render each through the template; all at once where no tools differ, and one by one to name a row that fails."""
    from jinja2 import TemplateError

    if prefixes and not any(prefix.tools for prefix in prefixes):
        try:
            together: list[str] = tokenizer.apply_chat_template(
                [prefix.messages for prefix in prefixes], tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, TypeError, ValueError):
            pass  # met again below, where it is known which row it is
        else:
            return together
    return [_render(prefix, tokenizer, prompt=prompt) for prefix in prefixes]


def _render(prefix: _Prefix, tokenizer: Tokenizer, *, prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            prefix.messages, tools=prefix.tools, tokenize=False, add_generation_prompt=prompt
        )
    except (TemplateError, TypeError, ValueError) as error:
        turn = len(prefix.messages)
        what = f"turn {turn}: what comes before it" if prompt else "the conversation"
        raise DataError(f"row {prefix.row}: {what} is refused by the chat template: {error}") from error
    return text


# Masks by prefixes


def _derived(dialogues: Sequence[Dialogue], texts: Sequence[str], tokenizer: Tokenizer) -> list[list[Span]]:
    """Return where each learned turn stands in its text."""
    turns = [(place, turn) for place, dialogue in enumerate(dialogues) for turn in dialogue.learned]
    for place, turn in turns:
        if turn == 0:
            raise DataError(
                f"row {dialogues[place].row}: turn 0: nothing comes before the assistant, so where it begins cannot be "
                "derived; begin with a user turn, or do not learn this one (a weight of 0 and task.learn: weighted)"
            )
    inner = [(place, turn) for place, turn in turns if turn + 1 < len(dialogues[place].messages)]
    before = dict(zip(turns, _cut(dialogues, turns, tokenizer, extra=0), strict=True))
    through = dict(zip(inner, _cut(dialogues, inner, tokenizer, extra=1), strict=True))
    ends = _special_texts(tokenizer)
    spans: list[list[Span]] = [[] for _ in texts]
    for place, turn in turns:
        upto = through.get((place, turn), texts[place])
        _check_nesting(dialogues[place].row, turn, before[place, turn], upto, texts[place])
        closed = upto.rstrip()
        spans[place].append((len(before[place, turn]), len(closed if closed.endswith(ends) else upto)))
    return spans


def _cut(
    dialogues: Sequence[Dialogue], turns: Sequence[tuple[int, int]], tokenizer: Tokenizer, *, extra: int
) -> list[str]:
    prefixes = [
        _Prefix(dialogues[place].row, dialogues[place].messages[: turn + extra], dialogues[place].tools)
        for place, turn in turns
    ]
    return _rendered(prefixes, tokenizer, prompt=extra == 0)


def _check_nesting(row: int, turn: int, before: str, through: str, text: str) -> None:
    if not through.startswith(before):
        place = next((at for at, (a, b) in enumerate(zip(before, through, strict=False)) if a != b), len(through))
        raise DataError(
            f"row {row}: turn {turn}: the chat template does not nest: what it gives the model to answer ends in "
            f"{before[place:][:60]!r}, the turn itself goes on with {through[place:][:60]!r}; {_MEND}"
        )
    if not text.startswith(through):
        raise DataError(
            f"row {row}: turn {turn}: the chat template does not nest: it writes this turn otherwise once more turns "
            "follow (it may take out earlier thoughts), so the model would learn what it never says; make each turn a "
            f"sample of its own (task.turns: apart), learn the last (task.learn: last), or {_MEND}"
        )


def _special_texts(tokenizer: Tokenizer) -> tuple[str, ...]:
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple({*added, *tokenizer.all_special_tokens})


# Masks by {% generation %}


def _marked(dialogues: Sequence[Dialogue], texts: Sequence[str], tokenizer: Tokenizer) -> list[list[Span]]:
    """Return what the template marks of each text, seen to hold what the learned turns say."""
    return [
        _of_learned(dialogue, text, _generation(dialogue, text, tokenizer))
        for dialogue, text in zip(dialogues, texts, strict=True)
    ]


def _generation(dialogue: Dialogue, text: str, tokenizer: Tokenizer) -> list[Span]:
    # apply_chat_template gives a mask only, and loses its place (transformers 5.23): up to the row's end where a
    # span's last character belongs to no token, and short of a last character that takes several tokens.
    from transformers.utils.chat_template_utils import render_jinja_template

    render: Any = render_jinja_template  # annotated as returning text, though it returns texts and spans
    (rendered,), (spans,) = render(
        conversations=[dialogue.messages],
        tools=dialogue.tools,
        chat_template=tokenizer.get_chat_template(None, dialogue.tools),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    if rendered != text:
        raise DataError(f"row {dialogue.row}: the chat template renders this conversation differently a second time")
    return [(begin, end) for begin, end in spans if end > begin]


def _of_learned(dialogue: Dialogue, text: str, spans: list[Span]) -> list[Span]:
    if not dialogue.learned:
        return []
    turns = [turn for turn, message in enumerate(dialogue.messages) if message["role"] == "assistant"]
    where = f"row {dialogue.row}: the chat template marks {len(spans)} parts of it as {{% generation %}}"
    if len(spans) == len(turns):
        own = dict(zip(turns, spans, strict=True))
        spans = [own[turn] for turn in dialogue.learned]
        said = [text[begin:end] for begin, end in spans]
    elif list(dialogue.learned) == turns:
        said = ["".join(text[begin:end] for begin, end in spans)] * len(turns)
    else:
        raise DataError(
            f"{where}, the assistant has {len(turns)} turns, so which are the {len(dialogue.learned)} that are learned "
            f"cannot be told; {_MEND}"
        )
    for turn, part in zip(dialogue.learned, said, strict=True):
        if _last_line(dialogue.messages[turn]) not in part:
            raise DataError(f"{where}, and turn {turn} is not among them; {_MEND}")
    return spans


def _last_line(message: Message) -> str:
    return (message.get("content") or "").strip().rpartition("\n")[2].strip()


# From characters to tokens


def _mask(encoding: Any, text: str, spans: Sequence[Span]) -> NDArray[np.bool_]:
    trained = np.zeros(len(encoding.ids), dtype=np.bool_)
    for begin, end in spans:
        trained[_token_at(encoding, text, begin) : _token_from(encoding, text, end)] = True
    return trained


def _token_at(encoding: Any, text: str, place: int) -> int:
    """Return the token that holds a character, or the next one that any token holds."""
    found = (token for at in range(place, len(text)) if (token := encoding.char_to_token(at)) is not None)
    token = int(next(found, len(encoding.ids)))
    # Many byte-level tokenizers count no blanks as a token's own: one of blanks alone begins and stops where it ends.
    while token > 0 and place < (blank := encoding.token_to_chars(token - 1))[0] == blank[1]:
        token -= 1
    return token


def _token_from(encoding: Any, text: str, place: int) -> int:
    """Return the first token that starts at a character or behind it."""
    token = _token_at(encoding, text, place)
    while token < len(encoding.ids) and encoding.token_to_chars(token)[0] < place:
        token += 1
    return token


# What a run and a preview ask of a template


def answer_ends(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that end an answer: the tokenizer's end token, and the one the template closes a turn with.

    DataError when the template cannot render a question with its answer.
    """
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    (example,) = encode_dialogues([Dialogue(0, [question, answer], (1,))], tokenizer)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special.update(tokenizer.all_special_ids)
    last = int(np.flatnonzero(example.trained)[-1])
    # A {% generation %} that leaves the end token out ends just before it.
    closing = [int(token) for token in (*example.input_ids[last : last + 2],) if int(token) in special]
    return tuple(sorted({tokenizer.eos_token_id, *closing[:1]}))


class Agreement(NamedTuple):
    """How many conversations were compared with inference, and how many are the same there."""

    compared: int
    equal: int
    """Whose ids are those of `apply_chat_template`."""
    continued: int
    """Whose ids also begin with those the model is given to answer the last learned turn."""


def agreement(dialogues: Sequence[Dialogue], tokenizer: Tokenizer) -> Agreement:
    """Compare what is trained on with what `apply_chat_template` gives at inference, one conversation at a time."""
    equal = continued = 0
    for dialogue, trained in zip(dialogues, encode_dialogues(dialogues, tokenizer), strict=True):
        whole, ids = _at_inference(dialogue.messages, dialogue, tokenizer), trained.input_ids.tolist()
        equal += whole == ids
        for turn in dialogue.learned[-1:]:
            given = _at_inference(dialogue.messages[:turn], dialogue, tokenizer, add_generation_prompt=True)
            continued += ids[: len(given)] == given
    return Agreement(len(dialogues), equal, continued)


def _at_inference(messages: list[Message], dialogue: Dialogue, tokenizer: Tokenizer, **options: Any) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(messages, tools=dialogue.tools, return_dict=True, **options)[
        "input_ids"
    ]
    return ids

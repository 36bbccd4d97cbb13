"""Questions made of running text: a piece of a sentence is asked for by what stands around it.

A question is some of the words around the piece, with a question word before them or in the gap (as Lewis et al. 2019,
arXiv:1906.04980, whose "noisy clozes" need no translation). Now and then the sentence is taken out of the text, and the
piece is to be found where else it stands (as Ram et al. 2021, arXiv:2101.00438). Nothing here knows a question that a
person asked.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_LEAST, _MOST, _LONGEST = 40, 140, 80
"""Words of a passage, and of a sentence."""
_SENTENCE = re.compile(r"(?<=[.!?])[\"”’']? +(?=[A-Z\"“])")
_WORD = re.compile(r"\w[\w'’-]*")
_NAME = re.compile(r"(?:[A-Z][\w'’-]+|[A-Z]\.)(?: (?:(?:of|the|de|and) )?(?:[A-Z][\w'’-]+|[A-Z]\.))*")
_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_NUMBER = re.compile(rf"(?:\d{{1,2}} )?(?:{_MONTH} )?(?:\d{{1,2}}, )?\$?\d[\d,.]*\d%?|\d+")
_YEAR = re.compile(r"\b(?:1\d{3}|20\d\d)\b")
_COMMON = frozenset(
    """a about after again all also an and any are as at be because been before being between both but by can could did
    do does down during each for from had has have he her here his how i if in into is it its just may might more most
    must no not of off on only or other our out over she should so some such than that the their them then there these
    they this those through to too under until up very was we were what when where which while who whom whose why will
    with would you""".split()  # noqa: SIM905
)


class _Piece(NamedTuple):
    """What is asked for: a stretch of a sentence, and the word to ask for it by."""

    begin: int
    end: int
    asked_by: str


def texts(folder: Path) -> Iterator[str]:
    """Yield the running texts of the test data: books, and what instructions and questions of other sets are about."""
    for path in sorted((folder / "gutenberg_books").glob("*.txt")):
        yield path.read_text(encoding="utf-8")
    with gzip.open(folder / "pref_qa_feedback" / "pairs.jsonl.gz", "rt", encoding="utf-8") as file:
        prompts = {row["question_id"]: row["prompt"] for row in map(json.loads, file)}
    for prompt in prompts.values():
        yield prompt.partition("\n\n")[2].rpartition("\n\nQuestion:")[0]
    for row in json.loads((folder / "sft_dolly3k" / "dolly_3k.json").read_text(encoding="utf-8")):
        yield row["input"]


def passages(text: str) -> Iterator[list[str]]:
    """Yield the sentences of each passage of a text."""
    part: list[str] = []
    size = 0
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in _SENTENCE.split(" ".join(paragraph.split())):
            length = len(sentence.split())
            if not 0 < length <= _LONGEST:
                continue
            if size >= _LEAST and size + length > _MOST:
                yield part
                part, size = [], 0
            part.append(sentence)
            size += length
    if size >= _LEAST:
        yield part


def clozes(folder: Path, number: int, *, but: str, seed: int = 0) -> list[dict[str, Any]]:
    """Return that many questions of the texts, as the rows of SQuAD; every passage is asked about in turn, but those
    of which a sentence stands in the text `but`."""
    rng = random.Random(seed)
    every = (passage for text in texts(folder) for passage in passages(text))
    there = [passage for passage in every if not any(len(each) > 40 and each in but for each in passage)]
    made: list[dict[str, Any]] = []
    while len(made) < number:
        rng.shuffle(there)
        made += [row for passage in there if (row := _cloze(passage, rng))]
    return made[:number]


def _cloze(passage: list[str], rng: random.Random) -> dict[str, Any] | None:
    place = rng.randrange(len(passage))
    sentence = passage[place]
    pieces = list(_pieces(sentence, rng))
    if not pieces:
        return None
    piece = rng.choice(pieces)
    question, answer = _asked(sentence, piece, rng), sentence[piece.begin : piece.end]
    before, after = " ".join(passage[:place]), " ".join(passage[place + 1 :])
    context = " ".join(passage)
    start = len(before) + bool(before) + piece.begin
    if context.count(answer) > 1 and rng.random() < 0.25:
        context = " ".join(filter(None, (before, after)))
        start = context.find(answer)
    if start < 0 or not question:
        return None
    return {"question": question, "context": context, "answers": {"text": [answer], "answer_start": [start]}}


def _pieces(sentence: str, rng: random.Random) -> Iterator[_Piece]:
    """Yield names, numbers, and about half as many runs of one to three other words."""
    names = [found for found in _NAME.finditer(sentence) if found.start() and found.group().lower() not in _COMMON]
    numbers = list(_NUMBER.finditer(sentence))
    for found in names:
        yield _Piece(*found.span(), rng.choice(("who", "what", "which", "where")))
    for found in numbers:
        yield _Piece(*found.span(), "when" if _YEAR.search(found.group()) else "how many")
    runs = list(_runs(sentence))
    for run in rng.sample(runs, min(len(runs), max(1, (len(names) + len(numbers)) // 2))):
        yield _Piece(*run, "what")


def _runs(sentence: str) -> Iterator[tuple[int, int]]:
    """Yield where one to three words stand side by side that are not of the commonest."""
    run: list[re.Match[str]] = []
    for word in _WORD.finditer(sentence):
        is_common = word.group().lower() in _COMMON
        if run and (is_common or len(run) == 3 or sentence[run[-1].end() : word.start()] != " "):
            yield run[0].start(), run[-1].end()
            run = []
        if not is_common:
            run.append(word)
    if run:
        yield run[0].start(), run[-1].end()


def _asked(sentence: str, piece: _Piece, rng: random.Random) -> str:
    """Return the question: up to ten words on each side, mostly with some left out and the question word in front;
    empty where too few are left."""
    left = sentence[: piece.begin].split()[-rng.randint(3, 10) :]
    right = sentence[piece.end :].split()[: rng.randint(3, 10)]
    dropped = rng.uniform(0.0, 0.5)
    words = [word.strip('.,;:!?()"“”') for word in left + right if rng.random() >= dropped]
    kept = [word for word in words if word]
    if len(kept) < 3:
        return ""
    order = [*left, piece.asked_by, *right] if rng.random() < 0.3 else [piece.asked_by, *kept]
    return f"{' '.join(order)}?"

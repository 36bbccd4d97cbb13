"""Near-duplicates among a million short documents: `data.clean` on two cores against datasketch.

    pip install datasketch
    python benchmarks/deduplication.py [--documents 1000000] [--peer-documents 100000] [--json FILE]

The documents are made in memory, one in ten of them a copy of an earlier one with a word changed, every second
time its last. Each contender runs in a process of its own, whose memory is watched together with its children's.
`cleaning` is what a run does, shards read, written and all; `function` is `near_duplicates` on a list, in one process.
datasketch does what its documentation says, in one process, on fewer documents; the last line takes its time in
proportion to them. Recall and precision are over the planted copies whose Jaccard index of 5-word shingles, computed
from sets of words, is at least 0.85.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

THRESHOLD, NGRAM, SHORTEST, LONGEST, VOCABULARY = 0.85, 5, 30, 90, 50_000


def documents(number: int, seed: int = 0) -> tuple[list[str], dict[int, int]]:
    """Return the documents, and for each planted copy the document it is of."""
    generator = np.random.default_rng(seed)
    words = np.array([f"{'aeiou'[rank % 5]}{rank:x}" for rank in range(VOCABULARY)])
    texts: list[str] = []
    planted = {}
    for row in range(number):
        if row % 10 == 9:
            planted[row] = int(generator.integers(row))
            copy = texts[planted[row]].split()
            copy[-1 if row % 20 == 9 else generator.integers(len(copy))] = words[generator.integers(VOCABULARY)]
            texts.append(" ".join(copy))
        else:
            ranks = generator.zipf(1.3, size=generator.integers(SHORTEST, LONGEST)) % VOCABULARY
            texts.append(" ".join(words[ranks]))
    return texts, planted


def shingles(text: str) -> set[str]:
    """Return a document's shingles."""
    words = text.split()
    return {" ".join(words[place : place + NGRAM]) for place in range(len(words) - NGRAM + 1)}


def jaccard(one: str, other: str) -> float:
    """Return the Jaccard index of two documents' shingles."""
    first, second = shingles(one), shingles(other)
    return len(first & second) / len(first | second)


def cleaning(texts: list[str]) -> set[int]:
    """Clean as a run does, with two workers; return the rows that are removed."""
    from trainworks.cleaning import Clean, NearDuplicate
    from trainworks.data.cache import table
    from trainworks.data.hygiene.clean import clean

    wanted = Clean(near=NearDuplicate(threshold=THRESHOLD, ngram=NGRAM), workers=2)
    kept = clean(table({"text": texts}), wanted, {}).kept
    return set(range(len(texts))) - set(kept.tolist())


def function(texts: list[str]) -> set[int]:
    """Call the function; return the same."""
    from trainworks.data.hygiene import near_duplicates

    return set(np.flatnonzero(~near_duplicates(texts, THRESHOLD, NGRAM).keep).tolist())


def datasketch(texts: list[str]) -> set[int]:
    """Ask datasketch for candidates, and remove those whose exact index says so; return the same."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=THRESHOLD, num_perm=128)
    removed = set()
    for row, text in enumerate(texts):
        sketch = MinHash(num_perm=128)
        sketch.update_batch([shingle.encode() for shingle in shingles(text)])
        if any(jaccard(text, texts[other]) >= THRESHOLD for other in index.query(sketch)):
            removed.add(row)
        index.insert(row, sketch)
    return removed


CONTENDERS = {"cleaning": cleaning, "function": function, "datasketch": datasketch}


def measure(contender: str, number: int) -> None:
    """Run one contender and print what it did; the documents are made before the clock starts."""
    texts, planted = documents(number)
    print("ready", flush=True)
    sys.stdin.readline()
    begun = time.perf_counter()
    removed = CONTENDERS[contender](texts)
    seconds = time.perf_counter() - begun
    near = {row for row, original in planted.items() if jaccard(texts[row], texts[original]) >= THRESHOLD}
    found = len(near & removed)
    print(
        json.dumps(
            {
                "documents": number,
                "seconds": round(seconds, 1),
                "removed": len(removed),
                "recall": round(found / len(near), 5),
                "precision": round(found / max(1, len(removed)), 5),
            }
        )
    )


def watched(contender: str, number: int) -> dict[str, Any]:
    """Run a contender in its own process; return its figures with its peak memory beyond that of the documents."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--contender", contender, "--documents", str(number)]
        environment = os.environ | {"TRAINWORKS_CACHE": cache, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdin
        assert process.stdout
        process.stdout.readline()
        before = peak = memory(process.pid)
        process.stdin.write("go\n")
        process.stdin.close()
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(0.1)
        if process.returncode:
            raise SystemExit(f"{contender} ended with code {process.returncode}")
        figures: dict[str, Any] = json.loads(process.stdout.read())
    return figures | {"peak_gib": round(peak / 2**30, 2), "of_which_documents_gib": round(before / 2**30, 2)}


def memory(process: int) -> int:
    """Return the resident memory of a process and its children, pages that they share counted for one of them."""
    total = 0
    try:
        parent = psutil.Process(process)
        for one in (parent, *parent.children(recursive=True)):
            total += one.memory_full_info().uss
    except psutil.NoSuchProcess:
        return total
    return total


def main() -> None:
    """Run them in turn and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--peer-documents", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.contender:
        measure(chosen.contender, chosen.documents)
        return
    numbers = {"cleaning": chosen.documents, "function": chosen.documents, "datasketch": chosen.peer_documents}
    figures = {}
    for contender, number in numbers.items():
        figures[contender] = watched(contender, number)
        print(f"{contender:<12}{figures[contender]}", flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=2) + "\n")
    rates = {name: figure["documents"] / figure["seconds"] for name, figure in figures.items()}
    print(f"{rates['cleaning'] / rates['datasketch']:.1f}x datasketch's rate")


if __name__ == "__main__":
    main()

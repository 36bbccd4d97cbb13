"""Conversations to token ids and masks: `datasets.map` as TRL's SFTTrainer calls it, against this package.

    TRAINWORKS_DATA=FOLDER python benchmarks/preparation.py [--repeat 12] [--json FILE]

Both read Dolly's instructions (`sft_dolly3k` in the folder, each row `--repeat` times with a number added, so that none
is the same) and SmolLM2's tokenizer with its chat template, write what they made to disk, and begin without a cache.
TRL maps a function over the rows one by one, in one process unless `dataset_num_proc` says more; both are timed. Before
the times are compared, ids and masks are. The last line is the rate of ours over TRL's as it is called by default.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer

from trainworks import SFT
from trainworks.data.building import build
from trainworks.data.columns import fingerprint

CORES = len(os.sched_getaffinity(0))


def rows(folder: Path, repeat: int) -> Dataset:
    """Return prompts and completions as lists of messages, TRL's conversational form, which both read."""
    dolly = json.loads(next((folder / "sft_dolly3k").glob("*.json")).read_text(encoding="utf-8"))
    texts = [
        (f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"], row["output"])
        for row in dolly
        if row["output"].strip()
    ]
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": f"{n} {p}"}] for n in range(repeat) for p, _ in texts],
            "completion": [[{"role": "assistant", "content": c}] for _ in range(repeat) for _, c in texts],
        }
    )


def one_by_one(example: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Do what TRL does with a conversational prompt and completion: two renderings, and the first tells the mask."""
    given = tokenizer.apply_chat_template(example["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(example["prompt"] + example["completion"], return_dict=True)["input_ids"]
    return {"input_ids": whole, "completion_mask": [0] * len(given) + [1] * (len(whole) - len(given))}


def mapped(data: Dataset, tokenizer: Any, processes: int, folder: Path) -> tuple[float, Dataset]:
    """Return the seconds `datasets.map` takes, and what it made."""
    begun = time.perf_counter()
    made = data.map(
        one_by_one,
        fn_kwargs={"tokenizer": tokenizer},
        num_proc=processes if processes > 1 else None,
        cache_file_name=str(folder / f"mapped-{processes}.arrow"),
        new_fingerprint=f"mapped{processes}",
    )
    return time.perf_counter() - begun, made


def ours(data: Dataset, tokenizer: Any, processes: int) -> tuple[float, Dataset]:
    """Return the seconds this package takes, the check of the rows' content for its cache included."""
    from functools import partial

    begun = time.perf_counter()
    task = SFT(max_length=8192).resolve(data)
    key = f"{fingerprint(data)}-{processes}"
    prepared = build(key, data, partial(task.prepare, processor=tokenizer), task.arrange, workers=processes)
    return time.perf_counter() - begun, prepared.samples


def check(theirs: Dataset, own: Dataset) -> None:
    """Compare the ids and masks of every row."""
    for row, (left, right) in enumerate(zip(theirs.with_format("numpy"), own.with_format("numpy"), strict=True)):
        same = np.array_equal(left["input_ids"], right["input_ids"])
        # The template puts a line break after a turn's end, which TRL trains and this package does not.
        learned = np.array_equal(left["completion_mask"][:-1].astype(bool), right["trained"][:-1])
        assert same, f"the ids of row {row} differ"
        assert learned, f"the mask of row {row} differs"


def main() -> None:
    """Time both and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=12)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    folder = os.environ.get("TRAINWORKS_DATA")
    if folder is None:
        sys.exit("TRAINWORKS_DATA names no folder with sft_dolly3k and smollm2_tokenizer")
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "smollm2_tokenizer")
    data = rows(Path(folder), chosen.repeat)
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        os.environ["TRAINWORKS_CACHE"] = f"{place}/cache"
        # Ours first: once `map` has forked this process, tokenizers uses one thread in it.
        seconds["ours"], own = ours(data, tokenizer, CORES)
        seconds["ours again"], own = ours(data, tokenizer, CORES)
        for processes in dict.fromkeys((1, CORES)):
            seconds[f"map, {processes}"], theirs = mapped(data, tokenizer, processes, Path(place))
            check(theirs, own)
    tokens = int(np.asarray(own.with_format("numpy")["length"][:]).sum())
    for name, taken in seconds.items():
        print(f"{name:<16} {taken:7.2f} s  {tokens / taken:12,.0f} tokens/s  {len(data) / taken:9,.0f} rows/s")
    if chosen.json:
        chosen.json.write_text(json.dumps({"seconds": seconds, "tokens": tokens, "rows": len(data)}, indent=2) + "\n")
    print(f"{seconds[f'map, {CORES}'] / seconds['ours']:.2f}x with as many processes; with TRL's default of one:")
    print(f"{seconds['map, 1'] / seconds['ours']:.2f}x")


if __name__ == "__main__":
    main()

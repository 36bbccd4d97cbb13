from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

import model_cards
from model_cards.vocabulary import LICENSES, PIPELINE_TAGS
from trainworks.record import DataFacts, EvalReport, ModelFacts, RunRecord, Sample, StageFacts

HOSTILE = "---\nlicense: mit\n---\n<script>alert(1)</script> | cell | `code` ``` </pre> [x](javascript:1) $a$ # h"

TABLE = {"table", "thead", "tbody", "tr", "th", "td"}


def changed(record: RunRecord, **values: Any) -> RunRecord:
    return record.model_copy(update=values)


def front(text: str) -> tuple[dict[str, Any], str]:
    """Split a README the way the Hub does."""
    match = re.match(r"^(\s*---[\r\n]+)([\S\s]*?)([\r\n]+---(\r\n|\r|\n|\Z))", text)
    assert match is not None
    return yaml.safe_load(match.group(2)), text[match.end() :]


def poison(value: Any) -> Any:
    """Put the hostile text into every string of a record that is free text."""
    if isinstance(value, str):
        return HOSTILE
    if isinstance(value, dict):
        return {key: poison(inner) for key, inner in value.items()}
    return [poison(inner) for inner in value] if isinstance(value, list) else value


def test_a_mixture_shows_every_source_and_what_the_model_scores_on_it(
    pretrained: RunRecord, finetuned: RunRecord
) -> None:
    final = pretrained.final
    assert final is not None
    slices = {"manual": {"loss": final.metrics["loss"]}, "reviews": {"loss": final.metrics["loss"]}}
    reports = (*pretrained.reports[:-1], final.model_copy(update={"slices": slices}))
    parts = {"manual": pretrained.data, "reviews": finetuned.data}
    data = pretrained.data.model_copy(update={"source": "manual + reviews", "parts": parts})
    card = model_cards.build(changed(pretrained, data=data, reports=reports))
    text = str(card)
    assert card.metadata["datasets"] == ["stanfordnlp/sst2"]
    assert "The trained model on the rows of each source" in text
    assert re.search(r"\| reviews \| \d", text)
    assert text.index("### manual") < text.index("### reviews")
    assert finetuned.data.fingerprint in text
    assert "/home/me" not in text


def test_the_cleaning_of_the_training_rows_is_told_stage_by_stage(pretrained: RunRecord) -> None:
    assert "Cleaning" not in str(model_cards.build(pretrained))
    stages = (
        StageFacts(name="length", rows_in=2600, rows_out=2590, removed={"too short": 7, "too long": 3}),
        StageFacts(name="decontaminate", rows_in=2590, rows_out=2588, removed={HOSTILE: 2}, found={"items": 1200}),
    )
    data = pretrained.data.model_copy(update={"cleaning": stages})
    body = model_cards.build(changed(pretrained, data=data)).body
    lines = body[body.index("| Cleaning of train |") :].splitlines()
    assert lines[0] == "| Cleaning of train | Rows in | Rows out | Left out | Counted |"
    assert lines[2] == "| length | 2,600 | 2,590 | too short 7, too long 3 |  |"
    assert lines[3].startswith("| decontaminate | 2,590 | 2,588 |")
    assert lines[3].endswith("2 | items 1,200 |")
    assert lines[4] == ""
    assert "<script>" not in body


def test_metadata_of_an_adapter_names_all_that_the_hub_links(finetuned: RunRecord) -> None:
    metadata = model_cards.build(finetuned).metadata
    assert metadata["library_name"] == "peft"
    assert metadata["pipeline_tag"] == "text-classification"
    assert metadata["base_model"] == "distilbert/distilbert-base-uncased"
    assert metadata["base_model_relation"] == "adapter"
    assert metadata["datasets"] == ["stanfordnlp/sst2"]
    assert metadata["license"] == "apache-2.0"
    assert metadata["language"] == ["en"]
    (model,) = metadata["model-index"]
    (result,) = model["results"]
    assert result["dataset"]["type"] == "stanfordnlp/sst2"
    assert result["dataset"]["split"] == "validation"
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {"loss": 0.312, "accuracy": 0.884}


def test_metadata_of_a_full_finetune_says_finetune(finetuned: RunRecord) -> None:
    model = finetuned.model.model_copy(update={"tuning": "full"})
    metadata = model_cards.build(changed(finetuned, model=model)).metadata
    assert (metadata["library_name"], metadata["base_model_relation"]) == ("transformers", "finetune")


def test_metadata_survives_yaml_and_the_hubs_own_reader(pretrained: RunRecord, finetuned: RunRecord) -> None:
    from huggingface_hub import ModelCard

    for record in (pretrained, finetuned):
        card = model_cards.build(record)
        metadata, body = front(str(card))
        assert metadata == card.metadata
        assert body.lstrip("\n") == card.body
        evaluated = ModelCard(str(card)).data.get("eval_results")
        assert {result.metric_type for result in evaluated} >= {"loss"}


def test_a_local_path_stands_nowhere_in_the_card(pretrained: RunRecord) -> None:
    card = model_cards.build(pretrained)
    assert "/home/me" not in str(card)
    assert "datasets" not in card.metadata
    assert "base_model" not in card.metadata
    assert card.metadata["model-index"][0]["results"][0]["dataset"]["type"] == "manual"


@pytest.mark.parametrize("name", ["runs/base", "/srv/models/base", "../base", r"C:\models\base"])
def test_a_local_base_is_described_and_not_linked(finetuned: RunRecord, name: str) -> None:
    model = finetuned.model.model_copy(update={"name": name, "revision": None})
    card = model_cards.build(changed(finetuned, model=model))
    assert "base_model" not in card.metadata
    assert f"huggingface.co/{name}" not in card.body
    assert "Began from: base (a local folder)" in card.body
    assert "a local folder named base that is not on the Hub" in card.body


def test_paths_in_the_command_lose_their_folders(finetuned: RunRecord) -> None:
    command = "python -m finetune /home/me/a.yaml data.source=/mnt/secret/rows.jsonl output=~/runs/x"
    card = model_cards.build(changed(finetuned, command=command))
    assert "<pre>python -m finetune a.yaml data.source=rows.jsonl output=x</pre>" in card.body
    assert model_cards.lint(card) == []


def test_the_result_stands_before_everything_else(finetuned: RunRecord) -> None:
    body = model_cards.build(finetuned).body
    top = body[: body.index("\n## ")]
    assert "friendly" in top
    assert "accuracy 0.884 [0.863, 0.905]" in top
    assert "0.375 [0.335, 0.415] | 872 | better" in top
    assert "accuracy ≥ 0.88, was met: 0.884" in top


def test_the_evaluation_table_has_a_row_for_every_report(pretrained: RunRecord) -> None:
    body = model_cards.build(pretrained).body
    section = body[body.index("## Evaluation") : body.index("## Worked")]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(pretrained.reports) == 5
    assert rows[0].startswith("| unigram (baseline) |")
    assert rows[-1] == "| **final** | validation | 200 | 412 | 2.71 [2.66, 2.76] | 15.03 [14.23, 15.83] |"


def test_every_fact_of_a_run_is_on_its_card(finetuned: RunRecord) -> None:
    body = model_cards.build(finetuned).body
    facts = ["67,349", "37,569", "1,250,000 of 67,900,000 parameters (1.84%)", "714eb0fa89d2", "abab", "0.0002"]
    facts += [
        "0.005944 kWh",
        "NVML counter",
        "23%",
        "NVIDIA T4",
        "torch 2.13.0",
        "Resumed at step: 1,000",
        "Resumed on 1",
    ]
    facts += ["Said before training", "accelerate launch", "2,718 tokens/s", "fp16", "3 GiB", "6 min 10 s"]
    assert [fact for fact in facts if fact not in body] == []


def test_energy_that_was_not_measured_gives_the_reason(pretrained: RunRecord) -> None:
    assert "Energy: not measured: no counter can be read on this machine" in model_cards.build(pretrained).body


def test_sections_with_nothing_to_say_are_left_out(pretrained: RunRecord) -> None:
    bare = changed(pretrained, reports=(), comparisons=(), curve=(), goal=None, cost=type(pretrained.cost)())
    card = model_cards.build(bare)
    titles = re.findall(r"^## (.*)$", card.body, re.MULTILINE)
    assert titles == ["Use", "Limits", "Training data", "Training", "Environment", "Reproduce"]
    assert "model-index" not in card.metadata
    assert not card.shows_curve
    assert "Nothing was evaluated" in card.body


def test_limits_name_a_difference_that_could_be_chance(finetuned: RunRecord) -> None:
    unclear = finetuned.comparisons[1].difference.model_copy(update={"low": -0.01})
    worse = finetuned.comparisons[0].difference.model_copy(update={"low": 0.1, "value": 0.2, "high": 0.3})
    comparisons = [
        comparison.model_copy(update={"difference": difference})
        for comparison, difference in zip(finetuned.comparisons, [worse, unclear], strict=True)
    ]
    body = model_cards.build(changed(finetuned, comparisons=tuple(comparisons))).body
    assert "In accuracy the model cannot be told apart from the baseline “majority class”" in body
    assert "In loss the model is worse than the baseline “untuned”" in body
    assert "| no clear difference |" in body
    assert "| worse |" in body


def test_limits_name_an_earlier_evaluation_that_was_better(pretrained: RunRecord) -> None:
    *earlier, last = pretrained.reports
    worse = last.metrics["loss"].model_copy(update={"value": 2.95, "low": 2.9, "high": 3.0})
    reports = (*earlier, last.model_copy(update={"metrics": {"loss": worse}}))
    assert "The loss was better at step 150 (2.79) than at the end (2.95)" in str(
        model_cards.build(changed(pretrained, reports=reports)).body
    )


def test_a_run_that_stopped_early_says_so_first(pretrained: RunRecord) -> None:
    body = model_cards.build(changed(pretrained, status="preempted", step=120)).body
    assert body.index("not complete") < body.index("loss 2.71")
    assert "at step 120 of 200" in body


def test_hostile_values_stay_inert_wherever_they_stand(finetuned: RunRecord) -> None:
    loose = finetuned.model_dump(mode="json")
    fixed = ("kind", "status", "schema_version")
    record = RunRecord.model_validate({key: loose[key] if key in fixed else poison(loose[key]) for key in loose})
    card = model_cards.build(record)
    metadata, body = front(str(card))
    assert metadata == card.metadata
    assert "license" not in metadata or metadata["license"] != "mit"
    assert "<script" not in body
    assert "</script" not in body
    html = MarkdownIt("commonmark").enable("table").render(body)
    assert set(re.findall(r"<(\w+)", html)) <= {
        "h1",
        "h2",
        "p",
        "pre",
        "code",
        "strong",
        "ul",
        "li",
        "a",
        "img",
        *TABLE,
    }
    assert set(re.findall(r'(?:href|src)="([^"]*)"', html)) == {"curve.png", "run.json"}
    tables = re.findall(r"<table>(.*?)</table>", html, re.DOTALL)
    widths = [{len(re.findall("<t[hd]", row)) for row in table.split("<tr>")[1:]} for table in tables]
    assert len(tables) >= 4
    assert all(len(width) == 1 for width in widths)


def test_hostile_samples_cannot_leave_their_block(pretrained: RunRecord) -> None:
    *earlier, last = pretrained.reports
    sample = Sample(prompt=HOSTILE, reference="", output="\x1b[31mred\u202e" + HOSTILE)
    card = model_cards.build(changed(pretrained, reports=(*earlier, last.model_copy(update={"samples": (sample,)}))))
    assert "<script" not in card.body
    assert "\x1b" not in card.body
    assert "\u202e" not in card.body
    assert card.body.count("</pre>") == 3


def test_samples_are_shown_as_they_were_recorded(pretrained: RunRecord) -> None:
    *earlier, last = pretrained.reports
    sample = Sample(prompt="run /usr/bin/env python", reference="", output="*a*\n\n    b_c")
    card = model_cards.build(changed(pretrained, reports=(*earlier, last.model_copy(update={"samples": (sample,)}))))
    assert "<pre>run /usr/bin/env python</pre>" in card.body
    assert "<pre>*a*\n\n    b_c</pre>" in card.body
    assert model_cards.lint(card) == []


def test_the_snippet_is_python_whatever_the_example_holds(finetuned: RunRecord, pretrained: RunRecord) -> None:
    looked_at = 0
    for record in (finetuned, pretrained):
        for task in ("sft", record.task):
            *earlier, last = record.reports
            sample = Sample(prompt=HOSTILE, reference="", output="")
            reports = (*earlier, last.model_copy(update={"samples": (sample,)}))
            body = model_cards.build(changed(record, task=task, reports=reports)).body
            (code,) = re.findall(r"```python\n(.*?)\n```", body, re.DOTALL)
            compile(code, "snippet", "exec")
            looked_at += 1
    assert looked_at == 4


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize(
    ("tag", "words"),
    [("token-classification", "TokenClassification"), ("question-answering", "ForQuestionAnswering.from_pretrained")],
)
def test_words_and_answers_have_snippets_of_their_own(tag: str, words: str, tuning: str, finetuned: RunRecord) -> None:
    model = finetuned.model.model_copy(update={"tuning": tuning})
    body = model_cards.build(changed(finetuned, task=tag, pipeline_tag=tag, model=model)).body
    (code,) = re.findall(r"```python\n(.*?)\n```", body, re.DOTALL)
    compile(code, "snippet", "exec")
    assert (words in code) or 'pipeline("token-classification"' in code
    assert ("AutoPeftModel" in code) == (tuning == "lora")


def test_metrics_that_are_not_numbers_stay_out_of_the_metadata(finetuned: RunRecord) -> None:
    *earlier, last = finetuned.reports
    broken = last.metrics["loss"].model_copy(update={"value": math.nan})
    reports = (*earlier, last.model_copy(update={"metrics": last.metrics | {"loss": broken}}))
    card = model_cards.build(changed(finetuned, reports=reports))
    metrics = card.metadata["model-index"][0]["results"][0]["metrics"]
    assert [metric["type"] for metric in metrics] == ["accuracy"]
    assert any("loss of 'final'" in finding for finding in model_cards.lint(card))


def test_a_card_is_a_frozen_value_that_saves_itself(finetuned: RunRecord, tmp_path: Path) -> None:
    card = model_cards.build(finetuned)
    with pytest.raises(dataclasses.FrozenInstanceError):
        card.body = ""  # type: ignore[misc]
    path = card.save(tmp_path / "model")
    assert path.read_text(encoding="utf-8") == str(card)
    assert (tmp_path / "model" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert model_cards.build(RunRecord.model_validate(json.loads(finetuned.model_dump_json()))) == card


def test_a_notebook_shows_the_page_with_its_picture(finetuned: RunRecord) -> None:
    shown = model_cards.build(finetuned)._repr_markdown_()
    assert shown.startswith("# distilbert-sst2-lora")
    assert "](data:image/png;base64,iVBOR" in shown


def test_a_curve_is_drawn_with_gaps_and_many_baselines(pretrained: RunRecord, tmp_path: Path) -> None:
    gap = pretrained.curve[3].model_copy(update={"loss": math.nan})
    reports = tuple(
        EvalReport.model_validate(pretrained.reports[0].model_dump() | {"name": f"baseline $x_{i}$"}) for i in range(3)
    )
    record = changed(pretrained, curve=(*pretrained.curve[:3], gap), reports=(*reports, *pretrained.reports))
    model_cards.draw(record, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_importing_the_package_brings_no_heavy_library() -> None:
    code = (
        "import sys, model_cards; "
        "print([m for m in ('torch', 'transformers', 'huggingface_hub', 'matplotlib') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_lists_of_identifiers_hold_the_common_ones() -> None:
    assert {"apache-2.0", "mit", "cc-by-sa-4.0", "llama3.2", "other"} <= LICENSES
    assert {"text-generation", "text-classification", "image-segmentation", "fill-mask"} <= PIPELINE_TAGS
    assert len(LICENSES) > 70
    assert len(PIPELINE_TAGS) > 45


def finding(record: RunRecord, **values: Any) -> str:
    return "\n".join(model_cards.lint(model_cards.build(changed(record, **values))))


def test_lint_finds_nothing_in_an_honest_card(finetuned: RunRecord, pretrained: RunRecord) -> None:
    assert model_cards.lint(model_cards.build(finetuned)) == []
    assert model_cards.lint(model_cards.build(pretrained)) == []


def test_lint_names_unknown_identifiers_with_the_nearest(finetuned: RunRecord) -> None:
    hub = finetuned.config["hub"] | {"license": "apache2.0", "language": ["english"]}
    said = finding(finetuned, pipeline_tag="text-clasification", config=finetuned.config | {"hub": hub})
    assert "did you mean 'text-classification'?" in said
    assert "did you mean 'apache-2.0'?" in said
    assert "'english'" in said


def test_lint_finds_impossible_numbers(finetuned: RunRecord) -> None:
    *earlier, last = finetuned.reports
    negative = last.metrics["loss"].model_copy(update={"value": -1.0, "low": -1.1, "high": -0.9})
    outside = last.metrics["accuracy"].model_copy(update={"low": 0.9, "high": 0.95})
    reports = (*earlier, last.model_copy(update={"metrics": {"loss": negative, "accuracy": outside}}))
    cost = finetuned.cost.model_copy(update={"energy_joules": -3.0, "mfu": 1.4})
    said = finding(finetuned, reports=reports, cost=cost)
    for part in ("is negative", "outside its own interval", "energy_joules is -3.0", "mfu is 1.4"):
        assert part in said


def test_lint_asks_for_an_evaluation(pretrained: RunRecord) -> None:
    assert "never evaluated" in finding(pretrained, reports=(), comparisons=())


def test_lint_finds_placeholders_outside_of_what_models_say(finetuned: RunRecord) -> None:
    assert "TODO" in finding(finetuned, config=finetuned.config | {"about": "TODO: say what it does"})
    *earlier, last = finetuned.reports
    sample = Sample(prompt="TODO list", reference="", output="see [notes](notes.txt)")
    assert finding(finetuned, reports=(*earlier, last.model_copy(update={"samples": (sample,)}))) == ""


def test_lint_finds_tokens_and_missing_files(finetuned: RunRecord, tmp_path: Path) -> None:
    token = "hf_" + "Q" * 34
    assert token not in str(model_cards.build(changed(finetuned, notes=(f"used {token}",))))
    card = model_cards.build(finetuned)
    told = dataclasses.replace(card, body=f"{card.body} {token}")
    assert any("access token" in said for said in model_cards.lint(told))
    card.save(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert model_cards.lint(card, tmp_path) == [f"the card links to run.json, which is not in {tmp_path}"]
    (tmp_path / "run.json").write_text(changed(finetuned, notes=(token,)).model_dump_json())  # past what redacts it
    assert any("run.json holds a Hub access token" in said for said in model_cards.lint(card, tmp_path))


def test_lint_finds_the_card_of_an_adapter_beside_a_whole_model(finetuned: RunRecord, tmp_path: Path) -> None:
    card = model_cards.build(finetuned)
    card.save(tmp_path)
    finetuned.write(tmp_path)
    (found,) = model_cards.lint(card, tmp_path)
    assert "describes an adapter" in found
    assert "holds a whole model" in found


def test_lint_finds_a_path_that_was_written_into_a_card(finetuned: RunRecord) -> None:
    card = model_cards.build(finetuned)
    edited = dataclasses.replace(card, body=card.body + "\nSee /home/me/notes/a.txt\n")
    assert any("/home/me/notes" in said for said in model_cards.lint(edited))


def test_a_hub_name_needs_a_commit_to_be_believed(finetuned: RunRecord) -> None:
    data = DataFacts.model_validate(finetuned.data.model_dump() | {"revision": None})
    model = ModelFacts.model_validate(finetuned.model.model_dump() | {"revision": "main"})
    metadata = model_cards.build(changed(finetuned, data=data, model=model)).metadata
    assert "datasets" not in metadata
    assert "base_model" not in metadata


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_text_to_text_is_used_without_a_pipeline_which_transformers_no_longer_has(
    adapter: bool, finetuned: RunRecord
) -> None:
    model = finetuned.model.model_copy(update={"tuning": "lora" if adapter else "full"})
    record = finetuned.model_copy(update={"pipeline_tag": "summarization", "task": "seq2seq", "model": model})
    body = str(model_cards.build(record))
    assert "pipeline(" not in body
    assert ("AutoPeftModelForSeq2SeqLM.from_pretrained" in body) == adapter
    assert ("= AutoModelForSeq2SeqLM.from_pretrained" in body) != adapter

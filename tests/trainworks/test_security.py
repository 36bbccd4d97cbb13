"""Files from anybody: whatever a model, a data set or a run's folder holds, none of it runs, and nothing is written
outside the output and the caches. Each file below would leave a mark if it were believed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pytest
import tiny
import yaml
from datasets import Dataset, DatasetDict
from hub_server import TOKEN, HubServer, reached
from pyarrow import parquet
from safetensors import safe_open
from typer.testing import CliRunner

import finetune
import model_cards
import pretrain
import trainworks.data.files
from trainworks import Budget, Data, Every, FromScratch, Optim, Pretrained, models
from trainworks.cleaning import Clean
from trainworks.cli import app
from trainworks.data.hygiene import clean as cleaning
from trainworks.errors import ToolkitError
from trainworks.schema import Batch
from trainworks.tasks import CausalLM

pytestmark = pytest.mark.faults

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
"""Endings of files that are never opened."""


# The place of a case, and what is seen of it


@dataclass(frozen=True)
class Place:
    """A folder with a good model and good rows, of which a case spoils something."""

    folder: Path

    @property
    def mark(self) -> Path:
        return self.folder / "outside" / "mark"

    @property
    def outside(self) -> Path:
        return self.folder / "outside"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def run(self, **changes: Any) -> finetune.Config:
        """Return a run of the model on the rows."""
        made = tiny.config("sft", self.model, self.data, self.output, budget=Budget(steps=2))
        return made.model_copy(update=changes)


class _Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (code(self.mark),)


def code(mark: Path) -> str:
    """Return Python that leaves the mark."""
    return f"open({str(mark)!r}, 'w').close()"


def payload(mark: Path) -> bytes:
    """Return a pickle that leaves the mark when it is read."""
    return pickle.dumps(_Payload(mark), protocol=2)


_watchers: list[Callable[[str, tuple[Any, ...]], None]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    for watcher in _watchers:
        watcher(event, arguments)


@pytest.fixture(scope="module", autouse=True)
def audited() -> None:
    """Have Python tell what it opens and does; such a hook stays until the process ends."""
    sys.addaudithook(_audit)


@dataclass
class Seen:
    """What went on that must not."""

    place: Place
    wrong: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            self._opened(*arguments[:3])
        elif event in ("subprocess.Popen", "os.system", "socket.connect", "socket.getaddrinfo"):
            if arguments[0] != "git":  # the run's own, for its record
                self.wrong.append(f"{event} {arguments}")
        elif event == "pickle.find_class" and arguments[1] in ("exec", "eval", "open"):
            self.wrong.append(f"{event} {arguments}")

    def _opened(self, path: Any, mode: str | None, flags: int) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return
        file = Path(os.fsdecode(path))
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or any(sign in (mode or "") for sign in "wax+")
        if file.suffix in PICKLES and file.is_relative_to(self.place.folder):
            self.wrong.append(f"opened {file}")
        if writes and not self._may_write(file.resolve()):
            self.wrong.append(f"wrote {file}")

    def _may_write(self, file: Path) -> bool:
        """Tell whether a file stands in the output, the caches, the libraries' own or the system's places."""
        own = [self.place.output, self.place.folder / "cache", Path(os.environ["HF_HOME"]), Path("/dev"), Path("/proc")]
        if any(file.is_relative_to(folder.resolve()) for folder in own) or "__pycache__" in file.parts:
            return True
        return file.is_relative_to(tempfile.gettempdir()) and not file.is_relative_to(self.place.folder.resolve())


def files(place: Place) -> dict[str, bytes]:
    """Return all files that a run must leave as they are."""
    kept = [path for path in place.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {
        str(path.relative_to(place.folder)): path.read_bytes()
        for path in kept
        if path.relative_to(place.folder).parts[0] not in ("output", "cache")
    }


@contextmanager
def watched(place: Place) -> Iterator[None]:
    """See that in the block nothing runs, nothing is fetched, no pickle is opened and nothing is written elsewhere."""
    before, seen = files(place), Seen(place)
    _watchers.append(seen)
    try:
        yield
    finally:
        _watchers.remove(seen)
    assert not place.mark.exists(), "a payload ran"
    assert not seen.wrong
    assert files(place) == before


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, and a finished run of them."""
    place = Place(tmp_path_factory.mktemp("good"))
    place.data.mkdir()
    tiny.save_model(place.model, "sft")
    tiny.save_rows(place.data / "train.jsonl", "sft", 24)
    finetune_and_export(place)
    return place.folder


def finetune_and_export(place: Place) -> None:
    from trainworks import export

    run = finetune.prepare(place.run(every=Every(log=1, save=1)))
    record = finetune.fit(run)
    model_cards.build(record).save(export(run))


@pytest.fixture
def place(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A copy of the good folder to spoil; the run in it says that it is where it is."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    here = Place(tmp_path)
    here.outside.mkdir()
    record = here.output / "run.json"
    record.write_text(record.read_text().replace(str(good), str(tmp_path)))
    monkeypatch.setenv("TRAINWORKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(here.model)  # where a module of that folder would be found
    monkeypatch.syspath_prepend(here.model)
    return here


# What is done with them


def prepare(place: Place) -> None:
    """Begin a new run."""
    shutil.rmtree(place.output)
    finetune.prepare(place.run())


def train(place: Place) -> None:
    """Do a new run from beginning to end, generated answers included."""
    shutil.rmtree(place.output)
    finetune_and_export(place)


def resume(place: Place) -> None:
    """Go on with the run that is there."""
    finetune.fit(finetune.prepare(place.run(every=Every(log=1, save=1))))


def preview(place: Place) -> None:
    """Look at its rows, as the command does."""
    command(place, "preview")


def from_scratch(place: Place) -> None:
    """Pretrain with the folder's tokenizer."""
    shutil.rmtree(place.output)
    config = pretrain.Config(
        output=str(place.output),
        task=CausalLM(block=16),
        model=FromScratch(architecture="llama", sizes=tiny.SIZES, tokenizer=str(place.model)),
        data=Data(source=str(place.data), holdout=0, columns={"text": "completion"}),
        batch=Batch(per_step=2),
        budget=Budget(steps=1),
        optim=Optim(lr=1e-3),
    )
    pretrain.prepare(config)


def image_processor(place: Place) -> None:
    models.load_processor("image_processor", str(place.model))


def card(place: Place) -> None:
    """Build the run's card again, and publish it on trial."""
    invoke("card", str(place.output))
    invoke("publish", str(place.output), "--repo", "someone/model", "--dry-run")


def command(place: Place, name: str) -> None:
    config = place.run().model_dump(mode="json")
    written = place.folder / "cache" / "run.yaml"
    written.parent.mkdir(exist_ok=True)
    written.write_text(yaml.safe_dump(config), encoding="utf-8")
    invoke(name, str(written))


def invoke(*words: str) -> None:
    """Run `trainworks` and raise what it says when it fails."""
    done = CliRunner().invoke(app, list(words), catch_exceptions=False)
    if done.exit_code:
        assert "Traceback" not in done.stderr
        raise ToolkitError(done.stderr)


# What is spoilt


Spoil = Callable[[Place], None]


def pickled(name: str, *, without: str = "") -> Spoil:
    """Put a pickle where the name says; a file that would be read otherwise may be taken away."""

    def spoil(place: Place) -> None:
        path = place.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(payload(place.mark))
        if without:
            (place.folder / without).unlink()

    return spoil


def setting(file: str, **settings: Any) -> Spoil:
    """Set keys of a JSON file, and put code in the folder that they may name."""

    def spoil(place: Place) -> None:
        path = place.model / file
        value = json.loads(path.read_bytes()) if path.exists() else {}
        path.write_text(json.dumps(value | settings), encoding="utf-8")
        for name in ("evil", "modeling_evil", "tokenization_evil", "configuration_evil"):
            (place.model / f"{name}.py").write_text(code(place.mark))

    return spoil


def both(*spoils: Spoil) -> Spoil:
    def spoil(place: Place) -> None:
        for each in spoils:
            each(place)

    return spoil


def custom_generate(place: Place) -> None:
    (place.model / "custom_generate").mkdir()
    (place.model / "custom_generate" / "generate.py").write_text(f"{code(place.mark)}\ndef generate(*_, **__): ...")


def text(name: str, content: str) -> Spoil:
    return lambda place: (place.folder / name).write_text(content, encoding="utf-8") and None


def link(name: str, target: str = "outside/target") -> Spoil:
    """Move a file out of its folder, and leave a link there."""

    def spoil(place: Place) -> None:
        path, outside = place.folder / name, place.folder / target
        shutil.move(path, outside)
        path.symlink_to(outside)

    return spoil


def weight_index(shard: str, *, content: Callable[[Place], bytes] | None = None, linked: bool = False) -> Spoil:
    """Say in an index that the weights stand in `shard`."""

    def spoil(place: Place) -> None:
        weights = place.model / "model.safetensors"
        with safe_open(weights, "pt") as file:
            names = list(file.keys())
        name = shard.format(outside=place.outside)
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, name)}
        (place.model / "model.safetensors.index.json").write_text(json.dumps(index))
        path = place.model / name
        path.parent.mkdir(exist_ok=True)
        if linked:
            shutil.move(weights, place.outside / "weights")
            path.symlink_to(place.outside / "weights")
        else:
            shutil.move(weights, path)
        if content:
            path.write_bytes(content(place))

    return spoil


def distributed_checkpoint(place: Place) -> None:
    shutil.copy(place.model / "model.safetensors", place.model / "shard-00000-model-00001-of-00001.safetensors")
    (place.model / ".metadata").write_bytes(payload(place.mark))


def header(value: Mapping[str, Any] | bytes, *, length: int | None = None, data: int = 64) -> Spoil:
    """Write safetensors with a header that says what is not so."""
    encoded = value if isinstance(value, bytes) else json.dumps(value).encode()
    start = struct.pack("<Q", len(encoded) if length is None else length)
    return lambda place: (place.model / "model.safetensors").write_bytes(start + encoded + bytes(data)) and None


def tensor(*offsets: int, shape: tuple[int, ...] = (4, 4), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


TEMPLATES = {
    "globals": "{{{{ cycler.__init__.__globals__.os.mkdir({mark!r}) }}}}",
    "subclasses": "{{% for kind in ().__class__.__base__.__subclasses__() %}}{{% if kind.__name__ == '_wrap_close' %}}"
    "{{{{ kind.__init__.__globals__['mkdir']({mark!r}) }}}}{{% endif %}}{{% endfor %}}",
    "attr": "{{{{ (cycler | attr('__init__') | attr('__globals__')).os.mkdir({mark!r}) }}}}",
    "format": "{{% set f = '{{0.__init__.__globals__[os].mkdir}}'.format %}}{{{{ f(cycler) }}}}"
    "{{{{ lipsum.__globals__.os.mkdir({mark!r}) }}}}",
    "import": "{{{{ joiner.__init__.__globals__['__builtins__']['__import__']('os').mkdir({mark!r}) }}}}",
    "raise_exception": "{{{{ (raise_exception or lipsum).__globals__['__builtins__']['__import__']('os').mkdir("
    "{mark!r}) }}}}",
}
"""Ways out of Jinja that leave the mark where there is no sandbox."""


def template(name: str, file: str = "model/chat_template.jinja") -> Spoil:
    def spoil(place: Place) -> None:
        own = (place.folder / file).read_text()
        (place.folder / file).write_text(TEMPLATES[name].format(mark=str(place.mark)) + own)

    return spoil


def extension_type(write: Callable[[pa.Table, str], None], name: str, kind: str) -> Spoil:
    """Write rows whose column says that it is of a Python type, pickled beside it, as Arrow did up to version 14."""

    def spoil(place: Place) -> None:
        (place.data / "train.jsonl").unlink()
        says = {"ARROW:extension:name": kind, "ARROW:extension:metadata": payload(place.mark)}
        fields = [pa.field(column, pa.string(), metadata=says) for column in ("prompt", "completion")]
        rows = [[row[column] for row in tiny.rows("sft", 24)] for column in ("prompt", "completion")]
        write(pa.table(rows, schema=pa.schema(fields)), str(place.data / name))

    return spoil


def write_stream(table: pa.Table, path: str) -> None:
    with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def saved_elsewhere(place: Place) -> None:
    """Say in a saved data set that its rows stand outside."""
    saved_rows(place)
    shutil.move(place.data / "data-00000-of-00001.arrow", place.outside / "rows.arrow")
    state = json.loads((place.data / "state.json").read_bytes())
    state["_data_files"] = [{"filename": "../outside/rows.arrow"}]
    (place.data / "state.json").write_text(json.dumps(state))


def saved_splits_elsewhere(place: Place) -> None:
    shutil.rmtree(place.data)
    DatasetDict(train=Dataset.from_list(tiny.rows("sft", 24))).save_to_disk(place.data)
    shutil.move(place.data / "train", place.outside / "train")
    (place.data / "dataset_dict.json").write_text(json.dumps({"splits": ["../outside/train"]}))


def saved_rows(place: Place) -> None:
    shutil.rmtree(place.data)
    Dataset.from_list(tiny.rows("sft", 24)).save_to_disk(place.data)


def saved_pickle(place: Place) -> None:
    saved_rows(place)
    (place.data / "data-00000-of-00001.arrow").write_bytes(payload(place.mark))


def objects(mark: Path) -> np.ndarray[Any, Any]:
    made = np.empty(1, dtype=object)
    made[0] = _Payload(mark)
    return made


def object_array(place: Place) -> None:
    np.save(place.data / "train.npy", objects(place.mark), allow_pickle=True)


def kept_rows(place: Place) -> None:
    """Put an object array, which is a pickle, into the cache of rows read before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainworks.data.files, "IN_MEMORY", 0)
        finetune_rows(place)
    (starts,) = (place.folder / "cache").rglob("starts.npy")
    np.save(starts, objects(place.mark), allow_pickle=True)


def kept_numbers(place: Place) -> None:
    """The same in the cache of rows cleaned before."""
    finetune_rows(place, clean=Clean(text="prompt", exact=True))
    (kept,) = (place.folder / "cache").rglob(cleaning._KEPT)
    np.savez(kept, rows=objects(place.mark))


def finetune_rows(place: Place, **settings: Any) -> None:
    from trainworks.samples import read_rows

    read_rows(place.run(data=Data(source=str(place.data), holdout=0.2, **settings)))


def clean_again(place: Place) -> None:
    finetune_rows(place, clean=Clean(text="prompt", exact=True))


def report_elsewhere(place: Place) -> None:
    """Have the record name a report whose numbers would stand outside."""
    record = json.loads((place.output / "run.json").read_bytes())
    record["reports"][0]["name"] = "../../outside/numbers"
    (place.output / "run.json").write_text(json.dumps(record))


def folder_link(name: str) -> Spoil:
    def spoil(place: Place) -> None:
        shutil.move(place.folder / name, place.outside / "folder")
        (place.folder / name).symlink_to(place.outside / "folder")

    return spoil


@dataclass(frozen=True)
class Case:
    """A spoilt file, what is done with it, and what must be said; None where it is ignored."""

    spoil: Spoil
    said: str | None = None
    do: Callable[[Place], None] = prepare


KERNEL = "kernels-community/flash-attn"
EVIL = {"AutoConfig": "configuration_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": "evil/base",
    "auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"},
    "target_modules": ["q_proj"],
}
CASES = {
    # A model's pickles
    "weights beside safetensors": Case(pickled("model/pytorch_model.bin")),
    "weights alone": Case(pickled("model/pytorch_model.bin", without="model/model.safetensors"), "only safetensors"),
    "safetensors by name": Case(pickled("model/model.safetensors"), "model.*safetensors weights cannot be read"),
    "adapter": Case(
        both(pickled("model/adapter_model.bin"), setting("adapter_config.json", **ADAPTER)),
        r"adapter_config\.json: an adapter",
    ),
    "adapter without settings": Case(pickled("model/adapter_model.bin")),
    "training arguments": Case(pickled("model/training_args.bin")),
    "optimizer": Case(pickled("model/optimizer.pt")),
    "scheduler": Case(pickled("model/scheduler.pt")),
    "random state": Case(pickled("model/rng_state.pth")),
    "TensorFlow and Flax": Case(both(pickled("model/tf_model.h5"), pickled("model/flax_model.msgpack"))),
    "a tokenizer that is a pickle": Case(pickled("model/tokenizer.json"), "the tokenizer of"),
    "a pickle beside the tokenizer": Case(pickled("model/tokenizer.pkl")),
    "a vocabulary that is a pickle": Case(
        pickled("model/tokenizer.model", without="model/tokenizer.json"), "the tokenizer of"
    ),
    "a model for its tokenizer": Case(
        both(setting("tokenizer_config.json", tokenizer_class="LlamaModel"), pickled("model/pytorch_model.bin")),
        r"tokenizer_config\.json: tokenizer_class: LlamaModel",
    ),
    "a model for its tokenizer, in preview": Case(
        both(
            setting("tokenizer_config.json", tokenizer_class="LlamaModel"),
            pickled("model/pytorch_model.bin", without="model/model.safetensors"),
        ),
        r"tokenizer_config\.json: tokenizer_class: LlamaModel",
        preview,
    ),
    "a retriever for its tokenizer": Case(
        setting("config.json", tokenizer_class="RagRetriever"), r"config\.json: tokenizer_class: RagRetriever"
    ),
    "a model for the tokenizer of another": Case(
        both(setting("tokenizer_config.json", tokenizer_class="LlamaModel"), pickled("model/pytorch_model.bin")),
        r"tokenizer_config\.json: tokenizer_class: LlamaModel",
        from_scratch,
    ),
    "a distributed checkpoint": Case(distributed_checkpoint, r"shard-00000-model-.*is a part of a distributed"),
    # Code
    "code for the model": Case(
        setting("config.json", auto_map=EVIL, model_type="evil"), r"config\.json: auto_map: custom code"
    ),
    "code for a model that is known": Case(setting("config.json", auto_map=EVIL)),
    "code elsewhere": Case(
        setting("config.json", model_type="evil", auto_map={"AutoConfig": "someone/else--evil.Config"}),
        r"config\.json: auto_map",
    ),
    "code for the tokenizer": Case(
        setting(
            "tokenizer_config.json",
            auto_map={"AutoTokenizer": ["tokenization_evil.Slow", "tokenization_evil.Fast"]},
            tokenizer_class="Evil",
        ),
        r"tokenizer_config\.json: auto_map: Evil is custom code",
    ),
    "code for a tokenizer that is known": Case(
        setting("tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_evil.Fast"]})
    ),
    "code for the images": Case(
        setting("preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.E"}, image_processor_type="Evil"),
        r"preprocessor_config\.json: auto_map: Evil is custom code",
        image_processor,
    ),
    "code for generating": Case(custom_generate, None, train),
    # Kernels
    "attention": Case(
        setting("config.json", attn_implementation=KERNEL), r"config\.json: attn_implementation.*kernels"
    ),
    "attention, as it is kept": Case(
        setting("config.json", _attn_implementation="evil/kernel"), r"config\.json: _attn_implementation.*evil/kernel"
    ),
    "attention of a part": Case(
        setting("config.json", text_config={"attn_implementation": {"": KERNEL}}),
        r"config\.json: text_config\.attn_implementation",
    ),
    "attention that falls back on a kernel": Case(
        setting("config.json", attn_implementation="flash_attention_2"), r"config\.json: attn_implementation"
    ),
    "experts": Case(setting("config.json", experts_implementation="sonicmoe"), r"config\.json: experts_implementation"),
    "kernels of its own": Case(
        setting("config.json", use_kernels=True, kernel_config={"kernel_mapping": {"RMSNorm": "evil/kernel:RMSNorm"}})
    ),
    "quantisation": Case(
        setting("config.json", quantization_config={"quant_method": "mxfp4", "kernel": KERNEL}),
        r"config\.json: quantization_config.*mxfp4",
    ),
    "quantisation nobody knows": Case(
        setting("config.json", quantization_config={"quant_method": KERNEL}), r"config\.json: quantization_config"
    ),
    # Paths
    "linked weights": Case(link("model/model.safetensors"), r"model\.safetensors is a link to a file outside"),
    "linked settings": Case(link("model/config.json"), r"config\.json is a link to a file outside"),
    "linked template": Case(link("model/chat_template.jinja"), r"chat_template\.jinja is a link", preview),
    "an index of weights outside": Case(
        weight_index("../outside/weights.safetensors"), r"weight_map: \.\./outside/weights\.safetensors is no"
    ),
    "an index of weights anywhere": Case(weight_index("{outside}/w.safetensors"), "weight_map: /.*is no safetensors"),
    "an index of linked weights": Case(weight_index("part/w.safetensors", linked=True), "weight_map: part/.*link"),
    "an index of pickles": Case(
        weight_index("weights.bin", content=lambda place: payload(place.mark)), r"weight_map: weights\.bin is no"
    ),
    "an index that is none": Case(
        text("model/model.safetensors.index.json", '{"weight_map": ["model.safetensors"]}'), "weight_map"
    ),
    "weights by another name": Case(
        setting("config.json", transformers_weights="../outside/w.safetensors"), r"config\.json: transformers_weights"
    ),
    # JSON that is none
    "no tokenizer": Case(text("model/tokenizer.json", '{"added_tokens": [], "version": "1.0"}'), "the tokenizer of"),
    "no JSON": Case(text("model/tokenizer.json", "#!/bin/sh\n"), "the tokenizer of"),
    "deep settings": Case(text("model/config.json", "[" * 200_000), r"config\.json: cannot be read as JSON"),
    "deep tokenizer": Case(text("model/tokenizer.json", "[" * 200_000), "the tokenizer of"),
    "settings that are a list": Case(text("model/config.json", "[]"), r"config\.json: holds no JSON object"),
    # Headers that lie
    "a header longer than memory": Case(header(b"{}", length=2**62), "safetensors weights cannot be read"),
    "a header longer than the file": Case(header(b"{}", length=10_000), "safetensors weights cannot be read"),
    "a header that is a pickle": Case(
        lambda place: header(payload(place.mark))(place), "safetensors weights cannot be read"
    ),
    "offsets beyond the file": Case(header({"a": tensor(0, 2**40)}), "safetensors weights cannot be read"),
    "offsets that run back": Case(header({"a": tensor(64, 0)}), "safetensors weights cannot be read"),
    "offsets that overlap": Case(
        header({"a": tensor(0, 64), "b": tensor(32, 96)}, data=96), "safetensors weights cannot be read"
    ),
    "offsets with holes": Case(
        header({"a": tensor(0, 64), "b": tensor(128, 192)}, data=192), "safetensors weights cannot be read"
    ),
    "a shape unlike its size": Case(header({"a": tensor(0, 64, shape=(5, 5))}), "safetensors weights cannot be read"),
    "a shape beyond counting": Case(
        header({"a": tensor(0, 64, shape=(2**63, 2**63))}), "safetensors weights cannot be read"
    ),
    # Templates
    **{f"template: {name}": Case(template(name), "chat template") for name in TEMPLATES},
    "template: globals, in preview": Case(template("globals"), "chat template", preview),
    # Data
    "rows that are a pickle": Case(pickled("data/rows.pkl", without="data/train.jsonl"), "no files that can be read"),
    "JSON lines that are a pickle": Case(pickled("data/train.jsonl"), r"train\.jsonl"),
    "JSON lines that are a pickle, in preview": Case(pickled("data/train.jsonl"), r"train\.jsonl", preview),
    "Parquet that is a pickle": Case(pickled("data/train.parquet", without="data/train.jsonl"), r"train\.parquet"),
    "Arrow that is a pickle": Case(pickled("data/train.arrow", without="data/train.jsonl"), r"train\.arrow"),
    "an array of objects": Case(object_array),
    "a Python type in Arrow": Case(extension_type(write_stream, "train.arrow", "arrow.py_extension_type")),
    "a Python type in Parquet": Case(extension_type(parquet.write_table, "train.parquet", "arrow.py_extension_type")),
    "a script of datasets": Case(lambda place: (place.data / "data.py").write_text(code(place.mark)) and None),
    "a saved data set that is a pickle": Case(saved_pickle, "cannot be read"),
    "a saved data set elsewhere": Case(saved_elsewhere, "stands outside"),
    "saved splits elsewhere": Case(saved_splits_elsewhere, "stands outside"),
    # Caches
    "rows kept before": Case(kept_rows, "what was kept of the files cannot be read"),
    "numbers kept before": Case(kept_numbers, "cannot be read", clean_again),
    # A run's folder
    "accelerate's state": Case(
        both(
            *(
                pickled(f"output/checkpoints/step-00000001/{name}")
                for name in ("custom_checkpoint_0.pkl", "optimizer.bin")
            )
        ),
        None,
        resume,
    ),
    "the record": Case(pickled("output/run.json"), r"run\.json: cannot be read", resume),
    "the lines of the log": Case(pickled("output/metrics.jsonl"), None, resume),
    "an evaluation": Case(pickled("output/evaluations/final.json"), r"final\.json: cannot be read", resume),
    "a report elsewhere": Case(report_elsewhere, "outside/numbers", resume),
    "a linked log": Case(link("output/metrics.jsonl"), r"metrics\.jsonl is a link that leads out", resume),
    "a linked folder": Case(folder_link("output/model"), "model is a link that leads out", resume),
    "a linked folder, for its card": Case(folder_link("output/model"), "model is a link that leads out", card),
    "a linked card": Case(link("output/model/README.md"), None, card),
    "a linked model to publish": Case(
        link("output/model/model.safetensors"), r"model\.safetensors is a link to a file outside", card
    ),
    "pickles to publish": Case(pickled("output/model/training_args.bin"), None, card),
}

ran: set[str] = set()


@pytest.mark.parametrize("name", CASES)
def test_a_malicious_file_is_refused_or_ignored(name: str, place: Place) -> None:
    case = CASES[name]
    case.spoil(place)
    with watched(place):
        if case.said is None:
            case.do(place)
        else:
            with pytest.raises(ToolkitError, match=rf"(?s){case.said}"):
                case.do(place)
    ran.add(name)


def test_at_least_25_malicious_files_were_tried(request: pytest.FixtureRequest) -> None:
    asked = {item.name for item in request.session.items if item.name.startswith("test_a_malicious_file")}
    assert len(ran) == len(asked)
    assert len(CASES) >= 25


# The Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with reached(monkeypatch) as server:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


REPOSITORIES = {
    "attention": Case(setting("config.json", attn_implementation=KERNEL), r"config\.json: attn_implementation"),
    "code": Case(setting("config.json", auto_map=EVIL, model_type="evil"), r"config\.json: auto_map"),
    "adapter": Case(setting("adapter_config.json", **ADAPTER), r"adapter_config\.json: an adapter"),
    "pickles": Case(
        both(
            weight_index("weights.bin", content=lambda place: payload(place.mark)), text("model/model.safetensors", "")
        ),
        r"weight_map: weights\.bin is no safetensors file",
    ),
}


@pytest.mark.parametrize("name", REPOSITORIES)
def test_a_repository_on_the_hub_is_trusted_no_more_than_a_folder(name: str, place: Place, hub: HubServer) -> None:
    case, repository = REPOSITORIES[name], f"someone/{name.replace(' ', '-')}"
    case.spoil(place)
    hub.add(repository, {path.name: path.read_bytes() for path in place.model.iterdir() if path.is_file()})
    shutil.rmtree(place.output)
    with pytest.raises(ToolkitError, match=case.said):
        finetune.prepare(place.run(model=Pretrained(repository)))
    assert not place.mark.exists()
    assert "weights" not in " ".join(hub.requests)


def test_the_tokenizer_of_a_repository_is_trusted_no_more_than_that_of_a_folder(place: Place, hub: HubServer) -> None:
    both(setting("tokenizer_config.json", tokenizer_class="LlamaModel"), pickled("model/pytorch_model.bin"))(place)
    hub.add("someone/tokenizer", {path.name: path.read_bytes() for path in place.model.iterdir() if path.is_file()})
    with pytest.raises(ToolkitError, match=r"tokenizer_config\.json: tokenizer_class: LlamaModel"):
        models.load_processor("tokenizer", "someone/tokenizer")
    assert not [asked for asked in hub.requests if "pytorch_model.bin" in asked]


# The payloads are what they are taken for


def test_the_pickles_and_the_code_leave_the_mark_where_they_are_believed(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    pickle.loads(payload(mark))
    assert mark.exists()
    mark.unlink()
    exec(code(mark))
    assert mark.exists()
    mark.unlink()
    np.save(tmp_path / "array.npy", objects(mark), allow_pickle=True)
    np.load(tmp_path / "array.npy", allow_pickle=True)
    assert mark.exists()


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_templates_leave_the_mark_without_a_sandbox(name: str, tmp_path: Path) -> None:
    jinja2.Environment().from_string(TEMPLATES[name].format(mark=str(tmp_path / "mark"))).render()
    assert (tmp_path / "mark").exists()

"""The vocabulary of a run: what `pretrain` and `finetune` configurations are made of.

Every field is one YAML key. This module imports neither torch nor transformers, so a configuration is checked in a
moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    Strict,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from trainworks.errors import nearest
from trainworks.reading import AnyData
from trainworks.settings import Count, Name, Names, Rate, Settings, Share, SomeNames

__all__ = [
    "Average",
    "Batch",
    "Budget",
    "EarlyStop",
    "Every",
    "Faults",
    "Freeze",
    "FromScratch",
    "Full",
    "Goal",
    "Hub",
    "Layout",
    "LoRA",
    "NewImageProcessor",
    "NewTokenizer",
    "Optim",
    "Peft",
    "Pretrained",
    "Quantise",
    "RunConfig",
    "Speed",
]


class Quantise(Settings):
    """Keep the weights of linear layers in a few bits, by bitsandbytes; what is trained is an adapter beside them.

    4 bits are NormalFloat (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), 8 are LLM.int8 (Dettmers et al. 2022,
    arXiv:2208.07339), which rounds what goes into a layer too, by all tokens of a micro-batch where some are very
    large.
    """

    bits: Literal[4, 8]
    """Bits of a weight. The output head and the embeddings stay as they are."""
    double: bool = True
    """Round the scales of 4-bit weights as well, to 8 bits: 0.4 bits less for each weight."""


class Pretrained(Settings):
    """Weights that exist already: a Hub name or a local folder in Hugging Face format."""

    name: Name
    """Hub name (`distilbert/distilbert-base-uncased`) or a local folder."""
    revision: Name = "main"
    """Branch, tag or commit on the Hub; the commit it meant is written to the record."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of the weights. float32 masters train best; the arithmetic's precision is the hardware file's."""
    quantise: Quantise | None = None
    """Keep the weights in fewer bits, such as `{bits: 4}`: QLoRA, with `tuning: {type: lora}`."""
    new_tokens: Names = ()
    """Tokens to add to the tokenizer, such as `<think>`. Their embeddings begin as the mean of the others, and are
    trained and saved beside an adapter too."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(**{"name": name, **options})


class NewTokenizer(Settings):
    """A byte-level BPE tokenizer trained on the run's own training text."""

    vocab_size: Count
    """Tokens in all, special ones included."""
    min_frequency: Count = 2
    """A pair seen less often is never merged."""


class NewImageProcessor(Settings):
    """What turns images to numbers for new weights."""

    size: Count = 224
    """Height and width that every image is brought to, in pixels."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Taken off red, green and blue, from 0 to 1."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """What they are divided by then."""


ImageProcessor = Annotated[
    Annotated[Name, Tag("name")] | Annotated[NewImageProcessor, Tag("new")],
    Discriminator(lambda value: "name" if isinstance(value, str) else "new"),
]
Tokenizer = Annotated[
    Annotated[Name, Tag("name")] | Annotated[NewTokenizer, Tag("new")],
    Discriminator(lambda value: "name" if isinstance(value, str) else "new"),
]


class FromScratch(Settings):
    """New weights, drawn by the architecture's own initialisation from the run's seed."""

    architecture: Name
    """A transformers model type, such as `llama` or `qwen3`."""
    sizes: dict[str, Any]
    """Fields of that architecture's configuration (`hidden_size`, `num_hidden_layers`, ...); unknown ones are
    refused."""
    tokenizer: Tokenizer | None = None
    """A Hub name or folder, or `{vocab_size: N}` to train one on the training text; for tasks on text."""
    image_processor: ImageProcessor | None = None
    """A Hub name or folder, or `{size: N}` for squares of so many pixels; for tasks on images."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of the weights."""

    @model_validator(mode="after")
    def _reads_one(self) -> Self:
        if (self.tokenizer is None) == (self.image_processor is None):
            raise ValueError("give exactly one of tokenizer, image_processor")
        return self


def _model_kind(value: Any) -> str:
    if isinstance(value, FromScratch) or (isinstance(value, dict) and "architecture" in value):
        return "scratch"
    return "pretrained"


Model = Annotated[
    Annotated[Pretrained, Tag("pretrained")] | Annotated[FromScratch, Tag("scratch")], Discriminator(_model_kind)
]


class Full(Settings):
    """Train every weight."""

    type: Literal["full"] = "full"


class Freeze(Settings):
    """Train some of the weights, told by patterns that their whole names match, `*` standing for anything."""

    type: Literal["freeze"] = "freeze"
    train: SomeNames = ("*",)
    """Patterns of what is trained, such as `[model.layers.1?.*, lm_head.*]`."""
    freeze: Names = ()
    """Patterns of what is frozen out of that, such as `*embed*`."""

    @model_validator(mode="after")
    def _said(self) -> Self:
        if self.train == ("*",) and not self.freeze:
            raise ValueError("say what to train, or what to freeze; tuning: {type: full} trains everything")
        return self


class LoRA(Settings):
    """Train low-rank updates of the chosen linear layers and, for a new task head, the head (Hu et al. 2021,
    arXiv:2106.09685)."""

    type: Literal["lora"] = "lora"
    rank: Count = 16
    """Rank of each update."""
    alpha: Rate = 32.0
    """The update is scaled by alpha / rank."""
    dropout: Share = 0.0
    """Dropout on the adapter's input."""
    targets: Name | tuple[Name, ...] = "all-linear"
    """`all-linear` (every linear layer but the output head), `all-layers` (with convolutions), or names of layers."""
    options: dict[str, Any] = {}
    """Any other option of `peft.LoraConfig`, by its own name: `use_rslora: true` scales by alpha / sqrt(rank)
    (arXiv:2312.03732), `use_dora: true` trains lengths apart from directions (arXiv:2402.09353), `init_lora_weights:
    pissa` begins with the model's own largest directions (arXiv:2404.02948); what is exported then is a plain LoRA of
    twice the rank beside the untouched base."""
    b_lr_ratio: Annotated[float, Strict(), Field(gt=0)] = 1.0
    """Learning rate of the updates' second factor, B, over that of the first; above 1 it is LoRA+ (arXiv:2402.12354,
    which takes 16)."""
    merge: bool = False
    """Also export the base model with the update added in."""


class Peft(Settings):
    """Train an adapter of any other method that PEFT has, said in its own words."""

    type: Literal["peft"] = "peft"
    method: Name
    """PEFT's name of it: `IA3`, `LOKR`, `OFT`, `VERA`, ..."""
    options: dict[str, Any] = {}
    """Options of the method's configuration in PEFT, such as `target_modules`; unknown ones are refused."""
    merge: bool = False
    """Also export the base model with the adapter worked into it."""


Tuning = Annotated[Full | Freeze | LoRA | Peft, Field(discriminator="type")]


class Batch(Settings):
    """How many samples an optimizer step sees. It does not change with the number of devices."""

    per_step: Count
    """Samples per optimizer step, over all processes; packed ones, where rows are packed."""
    micro: Count | Literal["auto"] = "auto"
    """Samples a process holds at once; the loss does not depend on it."""
    pack: Count | Literal["off"] = "off"
    """Tokens per packed sample: whole rows are put together, kept apart from one another. Evaluation is not packed."""


class Budget(Settings):
    """How long to train: exactly one of these."""

    epochs: Annotated[float, Strict(), Field(gt=0)] | None = None
    """Passes over the training samples; 0.5 is half of one."""
    steps: Count | None = None
    """Optimizer steps."""
    tokens: Count | None = None
    """Tokens seen, padding not counted; turned into steps by the mean length of a sample."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in ("epochs", "steps", "tokens") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of epochs, steps, tokens; found {' and '.join(given) or 'none'}")
        return self


class Average(Settings):
    """An exponential moving average of the trained weights, kept in float32 beside them and saved with them."""

    decay: Share = 0.999
    """What of the average stays at each step."""
    use: tuple[Literal["evaluate", "export"], ...] = ("evaluate", "export")
    """Where the average stands in for the weights; training goes on with these."""


class Optim(Settings):
    """The optimizer, its schedule and gradient clipping."""

    name: Literal["adamw", "muon", "sgd"] = "adamw"
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101); Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon;
    its steps scaled to AdamW's size, arXiv:2502.16982) for the matrices between embeddings and head, with AdamW for all
    else; or SGD with momentum betas[0] (betas[1] unused)."""
    lr: Annotated[float, Strict(), Field(gt=0)]
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "cosine"
    """Shape after warm-up; linear falls to `min_lr_ratio` x lr, cosine likewise, constant stays, wsd stays and falls at
    the end by the square root of the time (arXiv:2405.18392), so that until then a run can be made longer."""
    min_lr_ratio: Share = 0.0
    """The schedule's last value as a share of lr."""
    warmup: Annotated[int, Strict(), Field(ge=0)] | Share = 0
    """Linear warm-up: a whole number is steps, a fraction below 1 is that share of all steps."""
    decay: Annotated[int, Strict(), Field(ge=0)] | Share = 0.2
    """How long wsd falls at the end: steps, or a share of all."""
    weight_decay: Rate = 0.0
    """Weight decay, decoupled but for sgd; never applied to biases and other one-dimensional weights."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay of AdamW's first and second moment."""
    momentum: Share = 0.95
    """Momentum of Muon."""
    eps: Annotated[float, Strict(), Field(gt=0)] = 1e-8
    """AdamW's denominator offset."""
    max_grad_norm: Annotated[float, Strict(), Field(gt=0)] | Literal["off"] = 1.0
    """Clip the global gradient norm to this."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How bfloat16 weights (`model.dtype`) are rounded after a step. To the nearest, they stand still once steps are
    small; stochastic rounding is right on average (arXiv:2010.06192), and the same in every run of the same seed."""
    moments: Literal["float32", "bfloat16", "8bit"] = "float32"
    """How AdamW's moments are kept: 8 bits are those of bitsandbytes (Dettmers et al. 2021, arXiv:2110.02861), with a
    scale for each 256 numbers."""
    layer_decay: Annotated[float, Strict(), Field(gt=0, le=1)] = 1.0
    """Learning rate of a layer over that of the one above it (arXiv:1801.06146, arXiv:2003.10555): head and last norm
    learn at lr, the embeddings slowest. 0.9 or so suits encoders; all layers learn alike at 1."""
    average: Average | None = None
    """Average the weights over the steps, such as `{decay: 0.999}`."""

    @model_validator(mode="after")
    def _used(self) -> Self:
        unused = {
            "eps": self.name == "sgd",
            "momentum": self.name != "muon",
            "rounding": self.name != "adamw",
            "moments": self.name != "adamw",
        }
        for name, idle in unused.items():
            # The default may be said: a configuration that is written whole, and read again, says it.
            if idle and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} does nothing for {self.name}; leave it out")
        if self.schedule != "wsd" and self.decay != type(self).model_fields["decay"].default:
            raise ValueError(f"decay does nothing for schedule: {self.schedule}; leave it out")
        return self


class Speed(Settings):
    """What makes steps faster and leaves their loss as it is, to rounding."""

    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the model's layers; `auto` does on a GPU. The first step then takes some seconds longer."""
    background_saving: bool = False
    """Write checkpoints while training goes on, from a copy in the host's memory."""


class Layout(Settings):
    """What the hardware file has no word for: how the processes share one model's layers and experts."""

    pipeline: Count = 1
    """Processes, or groups of them, that each hold some of the layers."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero-bubble", "zero-bubble-v"] = "1f1b"
    """In which order a pipeline works on micro-batches: GPipe (arXiv:1811.06965), 1F1B and interleaved 1F1B
    (arXiv:2104.04473), zero-bubble (arXiv:2401.10241)."""
    expert: Count = 1
    """Processes that each hold some of a layer's experts; those of the hardware file's tensor size."""


Interval = Count | Literal["end"]


class Every(Settings):
    """When to log, evaluate and save, in optimizer steps; `end` is once, after the last step."""

    log: Count = 10
    """Steps between lines of the log."""
    evaluate: Interval = "end"
    """Steps between evaluations; the last step is always evaluated."""
    save: Interval = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: Count = 2
    """Checkpoints kept, newest first; the best one is kept besides."""


Remedy = Literal["stop", "skip", "rollback"]


class Faults(Settings):
    """What a run does when something goes wrong. While nothing does, none of it touches what is learned.

    A bad step is one whose loss or gradient is not a number, or whose loss is a spike. It never reaches the weights.
    Then `stop` ends the run, `skip` goes on with the next step, and `rollback` goes on from the newest checkpoint and
    leaves the bad step out.
    """

    not_finite: Remedy = "stop"
    """What becomes of a step whose loss or gradient is not a number."""
    spike: Remedy | Literal["ignore"] = "ignore"
    """What becomes of a step whose loss is far above those before it."""
    sigma: Annotated[float, Strict(), Field(gt=0)] = 6.0
    """A spike lies more than so many standard deviations above the mean of the window."""
    window: Annotated[int, Strict(), Field(ge=8)] = 128
    """Good steps that a loss is compared with; before there are as many, no loss is a spike."""
    at_most: Count = 100
    """Bad steps in a row after which the run stops, whatever is said above."""
    full_disk: Literal["stop", "go_on"] = "stop"
    """What becomes of a run that cannot save since the disk is full; the checkpoints before stay in any case."""
    rank_timeout: Count = 600
    """Seconds without a sign of life, or of waiting for one process, after which that is taken to hang, and the others
    end; more than the longest save takes."""
    stop_within: Count = 25
    """Seconds after a SIGTERM in which the run saves and ends, or ends without; torchrun kills after 30."""


class Goal(Settings):
    """The problem, stated as a number: the card and the outcome say whether it was met."""

    metric: Name
    """A metric of the task, or `loss`."""
    at_least: Annotated[float, Strict()] | None = None
    """The value to reach, where more is better."""
    at_most: Annotated[float, Strict()] | None = None
    """The value to stay under, where less is better."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("give exactly one of at_least, at_most")
        return self


class EarlyStop(Settings):
    """When to end before the budget is used up. The last weights are exported; the best are kept as a checkpoint."""

    metric: Name = "loss"
    """A metric of the task, or `loss`; whether more or less of it is better is known."""
    patience: Count = 3
    """Evaluations in a row that may be no better than the best before them."""
    min_gain: Rate = 0.0
    """What is better must be so by more than this."""


def _repository(value: str) -> str:
    if value.count("/") != 1 or value.startswith("/") or value.endswith("/"):
        raise ValueError(f"expected owner/name, found {value!r}")
    return value


class Hub(Settings):
    """Where and how the model is published."""

    repo: Annotated[str, AfterValidator(_repository)]
    """owner/name on the Hub."""
    private: bool = True
    """Whether only you can see it."""
    license: Name
    """The licence the weights are published under: an identifier of the Hub, such as `apache-2.0`."""
    language: Names = ()
    """Languages of the text, as ISO 639-1 codes."""
    push: bool = False
    """Upload when training ends. The token is then checked before it begins."""


TaskT = TypeVar("TaskT", bound=Settings)


class RunConfig(Settings, Generic[TaskT]):
    """What every run says, whichever package runs it."""

    output: Name
    """Folder of this run: checkpoints, record, weights, card."""
    about: Name | None = None
    """What the model is for, in a sentence or two; opens the card."""
    seed: Annotated[int, Strict(), Field(ge=0, lt=2**32)] = 0
    """The run's only source of chance: weights, order, dropout."""
    task: TaskT
    """What is learned: `{type: sft, ...}`."""
    model: Model
    """Where the weights come from."""
    tuning: Tuning = Full()
    """Which weights are trained."""
    data: AnyData
    """Where the rows come from: one source, or several under `sources`."""
    batch: Batch
    """Samples per step."""
    budget: Budget
    """How long to train."""
    optim: Optim
    """How to train."""
    speed: Speed = Speed()
    """How to compute."""
    layout: Layout = Layout()
    """How to share one model out, where the hardware file has no word for it."""
    every: Every = Every()
    """When to log, evaluate, save."""
    faults: Faults = Faults()
    """What to do when something goes wrong."""
    metrics: tuple[Name, ...] = ()
    """More metrics: names or local paths of Hugging Face `evaluate` modules, as `module` or `module:key`."""
    goal: Goal | None = None
    """The number to reach."""
    early_stop: EarlyStop | None = None
    """End once evaluations (`every.evaluate`) no longer get better, such as `{metric: accuracy, patience: 3}`."""
    trackers: tuple[Literal["tensorboard", "trackio"], ...] = ()
    """Experiment trackers beside the run's own metrics.jsonl."""
    deterministic: bool = False
    """Use only deterministic kernels, so that a GPU run repeats bit for bit (slower). Nothing is compiled then unless
    `speed.compile` says `on`: a compiled kernel depends on the sizes met before it."""
    hub: Hub | None = None
    """Where to publish."""
    accept: Names = ()
    """Keys of this file that may differ from the run that `output` holds, such as `optim.lr` or `budget`; `data` and
    `model` also accept other rows and weights under the same names. The record says what changed, and at which step."""

    @field_validator("accept")
    @classmethod
    def _known(cls, accept: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        known = list(_keys(info.data))
        waiting = cls.model_fields.keys() - info.data.keys()  # sections with mistakes of their own
        for name in accept:
            if name not in known and name.split(".")[0] not in waiting:
                raise ValueError(f"{name!r} is no key of this file{nearest(name, known)}")
        return accept


def _keys(values: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Yield every key of a configuration, sections too, as dotted names."""
    for key, value in values.items():
        yield above + key
        inside = value.model_dump(mode="json") if isinstance(value, Settings) else value
        if isinstance(inside, dict):
            yield from _keys(inside, f"{above}{key}.")

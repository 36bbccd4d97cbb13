"""Talk to a model in a terminal or a pipe: by its chat template, until its own stop tokens, word by word."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainworks.errors import ConfigError
from trainworks.models import check, load, load_processor
from trainworks.preview import visible
from trainworks.record import read_record
from trainworks.schema import Pretrained
from trainworks.trust import adapter_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Chat", "open_chat", "talk"]

Write = Callable[[str], object]

_HELP = "/reset begins anew, /exit ends; Ctrl-C ends an answer"


@dataclass
class Chat:
    """A conversation with a model, which hears all of it at each turn; one without a chat template continues each text
    by itself."""

    model: PreTrainedModel
    tokenizer: Any
    max_tokens: int = 512
    """Most tokens of an answer."""
    temperature: float | None = None
    """0 always takes the likeliest token; None samples, or not, as the model's own generation_config.json says."""
    system: str | None = None
    messages: list[dict[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, text: str, write: Write) -> str:
        """Return the answer, each part of it given to `write` as soon as it is there.

        Ctrl-C ends the answer, and what was said of it stays said. ConfigError when the template refuses the
        conversation, or it leaves no room for an answer; it is then as it was before.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        inputs = self._inputs(asked)
        parts: list[str] = []

        def heard(part: str) -> None:
            parts.append(part)
            write(part)

        try:
            self._generate(inputs, heard)
        except KeyboardInterrupt:
            write(" ...")
        answer = "".join(parts).strip()
        if self.tokenizer.chat_template is not None:
            self.messages = [*asked, {"role": "assistant", "content": answer}]
        return answer

    def _inputs(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        from jinja2 import TemplateError

        if self.tokenizer.chat_template is None:
            encoded = self.tokenizer(messages[-1]["content"], return_tensors="pt")
        else:
            try:
                encoded = self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
                )
            except (TemplateError, TypeError, ValueError) as error:
                raise ConfigError(f"the chat template refuses the conversation: {error}") from error
        inputs = {name: encoded[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        size, longest = inputs["input_ids"].shape[1], getattr(self.model.config, "max_position_embeddings", None)
        if size == 0:
            raise ConfigError("there is nothing to continue: say something")
        if longest is not None and size >= longest:
            raise ConfigError(
                f"the conversation has {size:,} tokens, and the model takes {longest:,}: /reset begins anew"
            )
        return inputs

    def _generate(self, inputs: dict[str, Any], write: Write) -> None:
        from transformers import TextStreamer

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                write(text)

        stops = self.model.generation_config.eos_token_id
        own = {"eos_token_id": self.tokenizer.eos_token_id if stops is None else stops}
        if self.temperature is not None:
            own |= {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        self.model.generate(  # type: ignore[operator]
            **inputs,
            **own,
            max_new_tokens=self.max_tokens,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            streamer=Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
        )


def open_chat(name: str, *, seed: int = 0, **options: Any) -> Chat:
    """Load a run's model, a model's or an adapter's folder, or a model from the Hub; `options` are those of `Chat`.

    Only safetensors are read and no code of a folder or repository runs. ConfigError or AccessError when it cannot be
    had, or is no model that writes text.
    """
    import torch

    folder = _folder(Path(name))
    adapter = folder if folder is not None and (folder / "adapter_config.json").is_file() else None
    where = str(folder or name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = Pretrained(where) if adapter is None else Pretrained(adapter_base(adapter))
    settings = settings.model_copy(update={"dtype": "bfloat16" if device == "cuda" else "float32"})
    check(settings)
    tokenizer = load_processor("tokenizer", where)
    model = load(settings, "AutoModelForCausalLM", {}, tokenizer, seed=seed)
    if adapter is not None:
        model = _adapted(model, adapter)
    return Chat(model.to(device).eval(), tokenizer, **options)  # type: ignore[arg-type]


def _folder(path: Path) -> Path | None:
    """Return the folder of the model itself, or None where it is no folder; ConfigError for a run without one."""
    if not path.is_dir():
        return None
    if (path / "run.json").is_file():
        tag = read_record(path).pipeline_tag
        if tag != "text-generation":
            raise ConfigError(f"{path}: its model is for {tag}, which is no conversation")
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return path
    if (path / "run.json").is_file() and not (path / "model").is_dir():
        raise ConfigError(f"{path}: the run has written no model yet; let it end, or call trainworks.export(run)")
    return path / "model" if (path / "model").is_dir() else path


def _adapted(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return a model with an adapter's update added in, which stops where the adapter has learned to."""
    from peft import PeftModel
    from transformers import GenerationConfig

    try:
        merged: Any = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder}: the adapter does not fit its model: {str(error).splitlines()[0]}") from error
    if (folder / "generation_config.json").is_file():
        merged.generation_config = GenerationConfig.from_pretrained(folder)
    tuned: PreTrainedModel = merged
    return tuned


def talk(chat: Chat, once: str | None = None) -> None:
    """Answer one question; or the lines of a terminal, or of a pipe, to the last, with nothing but answers on standard
    output."""
    if once is not None:
        _answer(chat, once)
        return
    for line in _lines():
        match line.strip():
            case "":
                continue
            case "/exit":
                return
            case "/reset":
                chat.reset()
            case text:
                try:
                    _answer(chat, text)
                except ConfigError as error:
                    print(f"error: {error}", file=sys.stderr)


def _answer(chat: Chat, text: str) -> None:
    # A terminal obeys control signs; a file is given the answer as it is.
    on_terminal = sys.stdout.isatty()
    chat.ask(text, lambda part: print(visible(part.expandtabs(4)) if on_terminal else part, end="", flush=True))
    print(flush=True)


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    print(_HELP, file=sys.stderr)
    while True:
        try:
            yield input("> ")
        except EOFError:
            return

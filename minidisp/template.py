"""The prompt template of examples: renders a dialogue as token ids, and marks those that the model learns to predict.

    template = Template.of(tokenizer)                    # the tokenizer's own chat template, or PLAIN
    ids, counted = template.render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    prompt, _ = template.render(messages, add_generation_prompt=True)       # the answer ends with template.stop_id

A template is Jinja source, as in transformers, and yields the same ids as `apply_chat_template`, with one difference:
the name of a special token in a message, such as </s>, is encoded as text, so that no message can end its own turn.
"""

import contextlib
import datetime
import itertools
import json
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from minidisp import InputError, parse_json, read_bytes
from minidisp.runtime.limits import limited_memory
from minidisp.tokenizer import HuggingFaceTokenizer, Tokenizer

# Roles and contents alternate, each followed by the end-of-text token. No tokenizer merges across it, so each part is
# tokenized independently of the others.
PLAIN = (
    "{% for message in messages %}{{ message['role'] + eos_token + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' + eos_token }}{% endif %}"
)
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SECONDS, BYTES = 5, 1 << 30  # limits for rendering a template once; real ones take milliseconds
FILE = "template.json"  # in the folder of a run that was trained on examples, next to tokenizer.model
Messages = Sequence[dict[str, str]]  # with "role" (system, user or assistant) and "content"


class Rendered(NamedTuple):
    """A dialogue as tokens; both lists have the same length."""

    ids: list[int]
    counted: list[bool]  # True from after a generation prompt up to and including the token that ends the turn


class Template:
    """A chat template and its tokenizer. Raises InputError if the template cannot be used.

    chat_template: the Jinja source. stop_id: the token that ends an assistant's turn, where generation stops.
    """

    def __init__(self, tokenizer: Tokenizer, chat_template: str, token_names: dict[str, str], now: str):
        """token_names: the values of eos_token etc. in the template. now: the ISO date that strftime_now formats; "" if
        it is not used.
        """
        self.chat_template, self._tokenizer, self._token_names, self._now = chat_template, tokenizer, token_names, now
        self._special = _special_tokens(tokenizer)
        # Among names that start at the same position the longest matches, as in the package tokenizers.
        self._names = sorted(self._special, key=len, reverse=True)
        self._name = re.compile("|".join(map(re.escape, self._names)))
        strips = [(self._special[name].lstrip, self._special[name].rstrip) for name in self._names]
        self._split = re.compile(
            "|".join(
                r"\s*" * left + f"({re.escape(name)})" + r"\s*" * right
                for name, (left, right) in zip(self._names, strips, strict=True)
            )
        )
        self._jinja = _compile(chat_template, datetime.datetime.fromisoformat(now or "2000-01-01"))
        self.stop_id = self._closing_token()

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Template":
        """The chat template of a Hugging Face tokenizer, or else PLAIN."""
        source, names = _own(tokenizer)
        now = datetime.date.today().isoformat() if "strftime_now" in source else ""
        return cls(tokenizer, source or PLAIN, names, now)

    @classmethod
    def from_meta(cls, meta: object, tokenizer: Tokenizer) -> "Template":
        """Restore the result of `to_meta`. Raises InputError if it is damaged."""
        fields = {"chat_template": str, "token_names": dict, "now": str}
        if not (isinstance(meta, dict) and all(type(meta.get(name)) is kind for name, kind in fields.items())):
            raise InputError(f"the prompt template is damaged: it must have {', '.join(fields)}")
        try:
            return cls(tokenizer, *(meta[name] for name in fields))
        except ValueError as error:
            raise InputError(f"the prompt template is damaged: {error}") from None

    def to_meta(self) -> dict:
        """The template as a JSON object, for meta.json and for a run's template.json."""
        return {"chat_template": self.chat_template, "token_names": self._token_names, "now": self._now}

    @property
    def is_own(self) -> bool:
        """Whether it is the chat template in the tokenizer's own settings."""
        return self.chat_template == _own(self._tokenizer)[0]

    def render(self, messages: Messages, add_generation_prompt: bool = False) -> Rendered:
        """The token ids of a dialogue, optionally followed by the generation prompt that opens an assistant's turn.

        Raises InputError if the template rejects the dialogue, or the assistant's turns cannot be located.
        """
        messages, guard = self._guarded(messages)
        text = self._text(messages, add_generation_prompt)
        starts = [self._start(messages, i, text) for i, m in enumerate(messages) if m["role"] == "assistant"]
        ids: list[int] = []
        counted: list[bool] = []
        counting, closed = False, 0
        for at, part, name in self._parts(text):
            start = next((start for start in starts if at <= start < at + len(part)), None)
            counting = counting or start is not None
            prompt = part[: start - at].replace(guard, "") if start is not None else ""
            if name:
                ids.append(self._special[name].id)
                counted.append(counting and not prompt.strip())
            else:
                tokens = self._tokenizer.encode(part.replace(guard, ""))
                ids += tokens
                # A token that spans the end of the prompt and the start of the answer is not counted.
                n_bytes, prompt_bytes = 0, len(prompt.encode("utf-8"))
                for token in tokens:
                    counted.append(counting and n_bytes >= prompt_bytes)
                    n_bytes += len(self._tokenizer.token_bytes[token])
            if name and counted[-1] and ids[-1] == self.stop_id:
                counting, closed = False, closed + 1
        if closed < len(starts):
            raise InputError("the chat template does not end every turn of the assistant with its end-of-turn token")
        return Rendered(ids, counted)

    def _guarded(self, messages: Messages) -> tuple[Messages, str]:
        """The messages with an unused character inserted into each name of a special token, and this character."""
        contents = "".join(message["content"] for message in messages)
        guard = next(_unused(contents + self.chat_template))
        guarded = lambda text: self._name.sub(lambda name: guard.join(name[0]), text)  # noqa: E731
        return [{**message, "content": guarded(message["content"])} for message in messages], guard

    def _text(self, messages: Messages, add_generation_prompt: bool) -> str:
        size = sum(len(message["content"]) for message in messages)
        try:
            with _limited():
                text = self._jinja.render(
                    messages=messages,
                    add_generation_prompt=add_generation_prompt,
                    tools=None,
                    documents=None,
                    **self._token_names,
                )
        except Exception as error:  # a template can raise anything
            raise InputError(f"the chat template cannot render it: {_in_short(error)}") from None
        if len(text) > 100 * size + (1 << 20):
            raise InputError(f"the chat template expands {size:,} characters to {len(text):,}")
        return text

    def _start(self, messages: Messages, i: int, text: str) -> int:
        """Where the content of messages[i] starts in the text of the whole dialogue: after the generation prompt."""
        prompt = self._text(messages[:i], True)
        if text.startswith(prompt):
            return len(prompt)
        # The generation prompt may be longer than the header of an earlier turn, for example with <think>.
        if text.startswith(before := self._text(messages[:i], False)):
            differs = (at for at, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b)
            return max(len(before), next(differs, len(text)))
        raise InputError("the chat template changes earlier turns, so the assistant's turns cannot be located")

    def _parts(self, text: str) -> Iterator[tuple[int, str, str]]:
        """(position, part, "") for text and (position, part, name) for a special token, with the spaces it strips."""
        at = 0
        for found in self._split.finditer(text):
            if at < found.start():
                yield at, text[at : found.start()], ""
            yield found.start(), found[0], self._names[found.lastindex - 1]
            at = found.end()
        if at < len(text):
            yield at, text[at:], ""

    def _closing_token(self) -> int:
        """The special token that follows the content of an assistant's turn."""
        text = self._text([{"role": "user", "content": "a"}, {"role": "assistant", "content": "ANSWER"}], False)
        end = text.rfind("ANSWER") + len("ANSWER")
        name = next((name for at, _, name in self._parts(text) if name and at >= end), None)
        if not name or "ANSWER" not in text:
            raise InputError("the tokenizer's chat template does not end the assistant's turn with a special token")
        return self._special[name].id


class _Special(NamedTuple):
    id: int
    lstrip: bool = False  # strips the whitespace before it
    rstrip: bool = False


def _special_tokens(tokenizer: Tokenizer) -> dict[str, _Special]:
    """The special tokens by name: those that plain text never produces."""
    special = {tokenizer.eos_token: _Special(tokenizer.eos_id)}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        for token in tokenizer.as_used["added_tokens"]:
            if token.get("special") or token["content"] == tokenizer.eos_token:
                special[token["content"]] = _Special(token["id"], token["lstrip"], token["rstrip"])
    return special


def _own(tokenizer: Tokenizer) -> tuple[str, dict[str, str]]:
    """The chat template in the settings of a Hugging Face tokenizer, "" if there is none, and its token names."""
    names, source = {"bos_token": tokenizer.eos_token, "eos_token": tokenizer.eos_token}, ""
    files = tokenizer.files if isinstance(tokenizer, HuggingFaceTokenizer) else {}
    if files:
        settings = json.loads(files.get("tokenizer_config.json", "{}"))
        given = {**json.loads(files.get("special_tokens_map.json", "{}")), **settings}
        values = {name: given[name] for name in TOKEN_NAMES if given.get(name)}
        names = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
        source = settings.get("chat_template") or ""
        if isinstance(source, list):  # several by name
            named = {str(entry.get("name")): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default", "")
        if "chat_template.json" in files:
            source = json.loads(files["chat_template.json"]).get("chat_template") or source
        source = files.get("chat_template.jinja") or source
    if not isinstance(source, str) or not all(isinstance(name, str) for name in names.values()):
        raise InputError("the tokenizer's chat template or the name of a special token is not a string")
    return source, {"eos_token": tokenizer.eos_token, **names}


def _compile(source: str, now: datetime.datetime) -> "jinja2.Template":  # noqa: F821 (imported below)
    """Compile a chat template in a sandbox, with the functions that transformers provides. Raises InputError."""
    import jinja2.ext  # comes with torch
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %}, which marks the assistant's text for transformers, is ignored here."""

        tags = frozenset(["generation"])

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    jinja = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    jinja.filters["tojson"] = to_json
    jinja.globals |= {"raise_exception": refuse, "strftime_now": now.strftime}
    try:
        with _limited():  # compiling evaluates constant expressions
            return jinja.from_string(source)
    except Exception as error:  # from Jinja, or from Python, which compiles Jinja's output
        raise InputError(f"the tokenizer's chat template is not valid: {_in_short(error)}") from None


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Limit the resources of a template: TimeoutError after SECONDS of CPU time, MemoryError beyond BYTES more memory.

    The sandbox keeps a template from files and Python internals, but not from looping forever. The time is limited in
    the main thread only, which receives signals, and the memory on Linux only.
    """
    began, inside = time.thread_time(), True

    def check(number, frame):
        if inside and time.thread_time() - began > SECONDS:
            raise TimeoutError(f"it takes more than {SECONDS} s")

    with contextlib.ExitStack() as stack:
        if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
            stack.callback(signal.signal, signal.SIGVTALRM, signal.signal(signal.SIGVTALRM, check))
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS / 10, SECONDS / 10)
            stack.callback(signal.setitimer, signal.ITIMER_VIRTUAL, 0)
        stack.enter_context(limited_memory(BYTES))
        try:
            yield
        finally:
            inside = False  # a late signal must not interrupt the removal of the limits


def _unused(text: str) -> Iterator[str]:
    """Characters that do not occur in a text: Unicode non-characters first, then private-use ones."""
    codes = itertools.chain(range(0xFDD0, 0xFDF0), range(0xF0000, 0x10FFFE))
    return (chr(code) for code in codes if chr(code) not in text)


def _in_short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def load_template(folder: str | Path, tokenizer: Tokenizer) -> Template | None:
    """The template of a run; None if it was trained on plain text. Raises InputError if it is damaged."""
    path = Path(folder) / FILE
    if not path.exists():
        return None
    try:
        return Template.from_meta(parse_json(read_bytes(path), path), tokenizer)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None

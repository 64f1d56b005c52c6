"""Rows of examples as dialogues, recognised by their fields.

messages                        a list of {role, content}: system (first only), then user and assistant alternating
conversations                   a list of {from, value}, as in ShareGPT; human and gpt are user and assistant
prompt, completion              one user turn and one assistant turn
instruction, (input,) output    likewise, as in Alpaca; the input follows the instruction after an empty line
"""

import json

ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT = {**ROLES, "human": "user", "gpt": "assistant"}
FIELDS = ("messages", "conversations", "prompt", "completion", "instruction", "input", "output")  # of all kinds


class Unusable(ValueError):
    """The reason why a row is not a valid example: a short one, which is counted, and the full message."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def as_messages(row: dict) -> list[dict[str, str]] | None:
    """The dialogue of a row: system, user and assistant messages; None if its fields are not those of an example.

    Raises Unusable if they are, but their content cannot be trained on.
    """
    if "messages" in row:
        messages = _turns(row["messages"], "messages", "role", "content", ROLES)
    elif "conversations" in row:
        messages = _turns(row["conversations"], "conversations", "from", "value", SHAREGPT)
    elif {"prompt", "completion"} <= row.keys():
        messages = _pair(text_of(row["prompt"], "prompt"), row["completion"], "completion")
    elif {"instruction", "output"} <= row.keys():
        prompt = text_of(row["instruction"], "instruction")
        if row.get("input"):
            prompt += "\n\n" + text_of(row["input"], "input")
        messages = _pair(prompt, row["output"], "output")
    else:
        return None
    _check(messages)
    return messages


def as_text(messages: list[dict[str, str]]) -> str:
    """The dialogue as text with role names, used to train a tokenizer and to choose the split."""
    return "\n".join(f"{message['role']}\n{message['content']}" for message in messages)


def _pair(prompt: str, answer: object, field: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": text_of(answer, field)}]


def _turns(value: object, field: str, role_field: str, text_field: str, roles: dict[str, str]) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise Unusable("not a list", f"field {field!r} is {_shown(value)}, not a list of messages")
    messages = []
    for i, turn in enumerate(value):
        where = f"{field}[{i}]"
        if not isinstance(turn, dict) or not {role_field, text_field} <= turn.keys():
            raise Unusable("not a message", f"{where} is not an object with {role_field!r} and {text_field!r}")
        role = turn[role_field]
        if not isinstance(role, str) or role not in roles:
            raise Unusable("unknown role", f"{where}: the role {_shown(role)} is not one of {', '.join(roles)}")
        messages.append({"role": roles[role], "content": text_of(turn[text_field], f"{where}.{text_field}")})
    return messages


def text_of(value: object, field: str) -> str:
    """The text in a field of a row. Raises Unusable if it is not a string or not valid Unicode."""
    if not isinstance(value, str):
        reason = "null" if value is None else "not a text"
        raise Unusable(reason, f"field {field!r} is {_shown(value)}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can contain a lone surrogate: "\ud83d"
        fault = f"half a surrogate pair at character {error.start}"
        raise Unusable("half a surrogate pair", f"field {field!r} has {fault}") from None
    return value


def _check(messages: list[dict[str, str]]) -> None:
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    before = "system" if len(turns) < len(messages) else ""
    for i, message in enumerate(turns, len(messages) - len(turns)):
        role = message["role"]
        if role == "system":
            raise Unusable(
                "system message later on", f"message {i + 1} has the role system, which only the first one may have"
            )
        if role == "assistant" and before != "user":
            raise Unusable(
                "two turns in a row" if before == "assistant" else "begins with the assistant",
                f"message {i + 1} is from the assistant, but does not follow a user message",
            )
        if role == before:
            raise Unusable("two turns in a row", f"messages {i} and {i + 1} are both from the {role}")
        if role == "assistant" and not message["content"].strip():
            raise Unusable("empty completion", f"message {i + 1}, from the assistant, is empty: nothing to learn")
        before = role
    if not any(message["role"] == "assistant" for message in messages):
        raise Unusable("no completion", "there is no assistant message: nothing to learn")


def _shown(value: object) -> str:
    try:
        return json.dumps(value, default=str)[:40]
    except RecursionError:  # needs a few frames more than reading it did
        return type(value).__name__

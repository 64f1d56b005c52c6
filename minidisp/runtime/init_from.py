"""--init-from: start a new run from the weights of another run or of a Hugging Face folder."""

import dataclasses

from minidisp import InputError, hf
from minidisp.config import Config, architecture_fields, from_dict, read_json, to_dict
from minidisp.data import Dataset
from minidisp.model import GPT, GPTConfig
from minidisp.runtime import checkpoint


def architecture_of(source: str) -> tuple[GPTConfig, bool]:
    """The config of the model in a run folder, a checkpoint file or a Hugging Face folder, read without its weights if
    possible, and whether a run may start from it with a shorter context."""
    if hf.is_folder(source):
        return hf.read_config(hf.find_folder(source))[1], True
    path = checkpoint.find(source)
    beside = path.parent / "config.json"
    saved = read_json(beside) if beside.is_file() else checkpoint.read(path)["config"]
    saved.pop("environment", None)
    try:
        config = from_dict(saved)
    except InputError as error:
        raise InputError(f"{beside if beside.is_file() else path}: {error}") from None
    return GPTConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(GPTConfig)}), False


def start_from(config: Config, dataset: Dataset) -> tuple[GPT, Config]:
    """The model named by --init-from, and the config with its architecture; the data must use its tokenizer.

    Dropout is taken from the config, and so is the context of a Hugging Face model if it is shorter. Raises InputError
    if the config sets another architecture; a field at its default does not count as set.
    """
    if hf.is_folder(config.init_from):
        source, tokenizer = hf.load(config.init_from, block_size=config.block_size)
        saved, how = source.config, f"prepare the data with --tokenizer hf:{config.init_from}"
    else:
        source, tokenizer, saved = checkpoint.load_run(config.init_from)
        how = "prepare the data with its tokenizer, --tokenizer-from"
    if tokenizer.hash != dataset.tokenizer.hash:
        raise InputError(f"--init-from {config.init_from} and {dataset.folder} have different tokenizers: {how}")
    asked, there, architecture = to_dict(config), to_dict(saved), architecture_fields()
    for name, field in architecture.items():
        if asked[name] not in (field.default, there[name]) and getattr(config, name) != getattr(saved, name):
            raise InputError(
                f"--init-from {config.init_from} has {name} {getattr(saved, name)}, not "
                f"{getattr(config, name)}: pass the same model flags"
            )
    return source, from_dict({**asked, **{name: there[name] for name in architecture}})

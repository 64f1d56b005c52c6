"""Export of a run to a transformers folder: config.json, model.safetensors, and the tokenizer's files."""

import json
import shutil
from pathlib import Path

from minidisp import InputError
from minidisp.hf.families import TOKEN_IDS, WEIGHTS, in_dtype
from minidisp.hf.reference import stored_form
from minidisp.runtime import checkpoint, files
from minidisp.template import Template, load_template
from minidisp.tokenizer import HuggingFaceTokenizer, Tokenizer, to_tokenizer


def export(run: str | Path, folder: str | Path, dtype: str = "float32") -> Path:
    """Write a run's model and tokenizer as a folder for transformers; returns the folder.

    run: a run folder or a checkpoint file. dtype: of the weights, float32, bfloat16 or float16.
    The tokenizer encodes and decodes every text identically; special tokens in a text are plain text, as in training
    (split_special_tokens). A tokenizer imported from a Hugging Face folder is exported unchanged, with its
    settings, and parses special tokens. So does the tokenizer of a run trained on examples, which includes the run's
    chat template: apply_chat_template in transformers gives the token ids of training.
    Raises InputError, leaving nothing behind, if the folder already exists or no family can represent the model.
    """
    try:
        import safetensors.torch
    except ImportError:
        raise InputError("Hugging Face weights need the package safetensors: pip install safetensors") from None
    model, tokenizer, _ = checkpoint.load_run(run)
    folder = Path(folder) if Path(folder).name else Path(folder).absolute()  # "." has no name
    if not files.is_free(folder):
        raise InputError(f"{folder} already exists: choose another folder")
    config, tensors = stored_form(model, tokenizer.eos_id)
    tensors = {name: in_dtype(tensor, dtype, name) for name, tensor in tensors.items()}
    template = load_template(checkpoint.find(run).parent, tokenizer)
    texts = _files(config | {"dtype": dtype}, tokenizer, template)
    try:
        with files.new_folder(folder, last="config.json") as building:
            for name, text in texts.items():
                (building / name).parent.mkdir(exist_ok=True)
                files.write_atomic(building / name, lambda file, text=text: file.write(text.encode()))
            safetensors.torch.save_file(tensors, building / WEIGHTS, metadata={"format": "pt"})
            shutil.copymode(building / "config.json", building / WEIGHTS)  # otherwise only its owner could read it
    except safetensors.SafetensorError as error:  # for example a full disk, which is not an OSError here
        raise InputError(f"{folder} cannot be written: {error}") from None
    return folder


def _files(config: dict, tokenizer: Tokenizer, template: Template | None) -> dict[str, str]:
    """The contents of config.json and of the tokenizer's files by name. template: of a run trained on examples."""
    # In training each document follows the EOS of the one before, so EOS is also the beginning-of-text token.
    config |= {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": None}
    kept = dict(tokenizer.files) if isinstance(tokenizer, HuggingFaceTokenizer) else {}
    if kept:
        config |= _token_ids(json.loads(kept.pop("config.json", "{}")), tokenizer.vocab_size)
        texts = {"config.json": _json(config), "tokenizer.json": _json(tokenizer.tokenizer_json), **kept}
        return texts | _chat(json.loads(kept.get("tokenizer_config.json", "{}")), tokenizer, template, {*kept})
    tokenizer_json, eos_token = to_tokenizer(tokenizer)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eos_token,
        "eos_token": eos_token,
        "model_max_length": config.get("n_positions") or config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    files = {"config.json": config, "tokenizer.json": tokenizer_json, "tokenizer_config.json": tokenizer_config}
    return {name: _json(values) for name, values in files.items()} | _chat(tokenizer_config, tokenizer, template, set())


def _token_ids(values: object, vocab_size: int) -> dict[str, object]:
    """The ids of special tokens in an imported config.json, which is untrusted: nothing else of it is used."""

    def is_id(value: object) -> bool:
        return type(value) is int and 0 <= value < vocab_size

    if not isinstance(values, dict):
        return {}
    ids = {name: values[name] for name in TOKEN_IDS if name in values}
    return {k: v for k, v in ids.items() if v is None or is_id(v) or (isinstance(v, list) and v and all(map(is_id, v)))}


def _chat(tokenizer_config: dict, tokenizer: Tokenizer, template: Template | None, there: set[str]) -> dict[str, str]:
    """The additional files, by name, of a run trained on examples: its chat template, in which special tokens are
    parsed, and the token that ends an answer. there: files that are exported unchanged."""
    if template is None:
        return {}
    changed = {name: value for name, value in tokenizer_config.items() if name != "split_special_tokens"}
    if not template.is_own:
        changed |= {"eos_token": tokenizer.eos_token, "chat_template": template.chat_template}
    texts = {"tokenizer_config.json": _json(changed)} if changed != tokenizer_config else {}
    if template.stop_id != tokenizer.eos_id and "generation_config.json" not in there:
        texts["generation_config.json"] = _json({"eos_token_id": [tokenizer.eos_id, template.stop_id]})
    return texts


def _json(values: dict) -> str:
    return json.dumps(values, indent=2) + "\n"

"""Hugging Face models, both ways: GPT-2, Qwen3 and Apertus weights in safetensors, each with its own tokenizer.

    model = minidisp.hf.load_model("folder")             # or owner/name on the hub
    model, tokenizer = minidisp.hf.load("folder")
    python -m minidisp.hf export runs/NAME folder          # for AutoModelForCausalLM and AutoTokenizer
    python -m minidisp.hf export runs/NAME folder --gguf   # for llama.cpp, Ollama and LM Studio

A folder holds config.json, model.safetensors (or shards and model.safetensors.index.json), tokenizer.json and
tokenizer_config.json.

    families.py    what each family of transformers can store: config.json, names and shapes of tensors
    reference.py   an independent implementation of the families, which every export is compared with
    importer.py    from a folder; exporter.py: to a folder; gguf.py: to a GGUF file; command.py: the command
    other.py       models of other families, computed by transformers, for evaluation
"""

from minidisp.hf.command import main
from minidisp.hf.exporter import export
from minidisp.hf.families import INDEX, WEIGHTS, read_config
from minidisp.hf.importer import FILES, find_folder, is_folder, load, load_model, load_tokenizer
from minidisp.tokenizer import to_tokenizer

__all__ = [
    "FILES",
    "INDEX",
    "WEIGHTS",
    "export",
    "find_folder",
    "is_folder",
    "load",
    "load_model",
    "load_tokenizer",
    "main",
    "read_config",
    "to_tokenizer",
]

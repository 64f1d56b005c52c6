"""Import and export of Hugging Face models: GPT-2, Qwen3 and Apertus weights in safetensors, with their tokenizers.

    model = minidisp.hf.load_model("folder")             # or owner/name on the hub
    model, tokenizer = minidisp.hf.load("folder")
    python -m minidisp.hf export runs/NAME folder          # for AutoModelForCausalLM and AutoTokenizer
    python -m minidisp.hf export runs/NAME folder --gguf   # for llama.cpp, Ollama and LM Studio

A folder contains config.json, model.safetensors (or shards and model.safetensors.index.json), tokenizer.json and
tokenizer_config.json.

    families.py    what each family of transformers can represent: config.json, names and shapes of tensors
    reference.py   an independent implementation of the families, against which every export is checked
    importer.py    import from a folder; exporter.py, gguf.py: export to a folder or GGUF file; command.py: the command
    other.py       models of other families, run by transformers, for evaluation
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

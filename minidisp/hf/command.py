"""Export a run for transformers, or as a GGUF file for llama.cpp.

python -m minidisp.hf export runs/NAME folder          # for AutoModelForCausalLM and AutoTokenizer
python -m minidisp.hf export runs/NAME folder --gguf   # for llama.cpp, Ollama and LM Studio
"""

import argparse
import warnings

from minidisp import InputError, printable
from minidisp.hf.exporter import export
from minidisp.hf.gguf import export_run as export_gguf
from minidisp.runtime.cli import Parser, exit_code


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: see exit_code."""
    parser = Parser(
        prog="-m minidisp.hf",
        usage="python -m minidisp.hf export [--dtype DTYPE] [--gguf] RUN DIR",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=("export",), help="export: write a run as a folder for transformers")
    parser.add_argument("run", metavar="RUN", help="run folder (its best checkpoint is used) or checkpoint file")
    parser.add_argument("folder", metavar="DIR", help="output folder; must be empty or not exist")
    parser.add_argument(
        "--dtype",
        type=str.lower,
        choices=("float32", "bfloat16", "float16", "q8_0"),
        default="float32",
        help="dtype of the weights (default float32); q8_0, 8 bits with one scale per 32 weights, needs --gguf",
    )
    parser.add_argument(
        "--gguf",
        action="store_true",
        help="write DIR/NAME-DTYPE.gguf for llama.cpp, Ollama or LM Studio instead (needs the package gguf)",
    )

    def command() -> None:
        args = parser.parse_args(argv)
        try:
            if args.gguf:
                with warnings.catch_warnings(record=True) as found:
                    path = export_gguf(args.run, args.folder, args.dtype)
                for warning in found:
                    print(f"note: {printable(str(warning.message))}")
                print(f"{printable(path)}: for llama.cpp, Ollama or LM Studio")
            elif args.dtype == "q8_0":
                raise InputError("--dtype q8_0 needs --gguf: for transformers use float32, bfloat16 or float16")
            else:
                folder = export(args.run, args.folder, args.dtype)
                print(
                    f"{printable(folder)}: for AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained"
                )
        except OSError as error:
            raise InputError(f"{error.filename or args.folder}: {error.strerror or error}") from None

    return exit_code("minidisp.hf", command)

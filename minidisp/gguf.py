"""`python -m minidisp.gguf RUN DIR` is short for `python -m minidisp.hf export RUN DIR --gguf`."""

import sys

from minidisp.hf import main
from minidisp.hf.gguf import DTYPES, export_run

__all__ = ["DTYPES", "export_run"]

if __name__ == "__main__":
    sys.exit(main(["export", "--gguf", *sys.argv[1:]]))

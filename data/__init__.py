"""Corpus preparation. A package, so that another module named data elsewhere on the path cannot take its place."""

import sys
from pathlib import Path

# Python imports a folder files/ with an __init__.py rather than files.py, and anything may be unpacked into data/.
for _module in Path(__file__).parent.glob("*.py"):
    if any(_module.with_suffix("").glob("__init__.*")):
        print(
            f"{_module.with_suffix('')} would be imported in place of {_module.name}: move this folder", file=sys.stderr
        )
        sys.exit(2)

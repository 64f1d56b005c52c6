"""Corpus preparation. A package, so that another module named `data` on the path cannot be imported in its place."""

import sys
from pathlib import Path

# Python prefers a folder files/ with an __init__.py to files.py, and users may unpack anything into data/.
for _module in Path(__file__).parent.glob("*.py"):
    if any(_module.with_suffix("").glob("__init__.*")):
        folder = _module.with_suffix("")
        print(f"{folder} would be imported in place of {_module.name}: move this folder", file=sys.stderr)
        sys.exit(2)

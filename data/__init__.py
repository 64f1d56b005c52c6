"""Corpus preparation. A package, so that another module named `data` on the path cannot be imported in its place."""

import sys
from pathlib import Path

# Python prefers a folder files/ with an __init__.py, and an extension module files.so, to files.py, and users may
# unpack anything into data/.
for _module in Path(__file__).parent.glob("*.py"):
    _folder = _module.with_suffix("")
    _others = [_folder] if any(_folder.glob("__init__.*")) else []
    _others += [_path for _path in _module.parent.glob(f"{_module.stem}.*") if _path.suffix in (".so", ".pyd")]
    if _others:
        print(f"{_others[0]} would be imported in place of {_module.name}: move it", file=sys.stderr)
        sys.exit(2)

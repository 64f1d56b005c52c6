"""minidisp: small language models trained from scratch, with and without the dispersion loss (arXiv 2602.00217).

from minidisp import dispersion_loss, DispersionLoss, GPT, GPTConfig, load
"""

import importlib

__version__ = "0.1.0"


class InputError(ValueError):
    """What the user gave cannot be used: the message is one line that says what, where, and what to do.

    Commands print it without a traceback and exit with code 2.
    """


# The public names load on first use, so that importing a small part (the tokenizer, say) does not import torch.
_HOME = {
    "GPT": "model",
    "GPTConfig": "model",
    "dispersion_loss": "dispersion",
    "DispersionLoss": "dispersion",
    "load": "checkpoint",
}
__all__ = ["InputError", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'minidisp' has no attribute '{name}'")
    return getattr(importlib.import_module(f"minidisp.{_HOME[name]}"), name)

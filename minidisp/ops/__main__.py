"""python -m minidisp.ops: which implementation of the dispersion loss is in use here, why, and whether it computes what it should."""

import sys

import torch

from minidisp import ops

if sys.argv[1:2] == ["check"]:  # of the CUDA kernels, in a process of its own
    torch.cuda.set_device(sys.argv[2])
    ops._find()
    text, good = ops.self_test("fused", sys.argv[2])
else:
    text, good = ops.diagnosis()
print(text)
sys.exit(0 if good else 1)

"""Builds the extension ahead: pip install --no-build-isolation -e . (csrc/ops.cpp says what it contains).

Without torch, or without a compiler, only the Python part is installed; minidisp/ops.py then builds on first use, or streams.
MINIDISP_BUILD=0 leaves the extension out, MINIDISP_BUILD=1 makes its failure an error.
"""

import os
import sys
from pathlib import Path

from setuptools import setup


def extension() -> dict:
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    from minidisp import ops

    cuda = ops.builds_cuda()
    if cuda and not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ops.CUDA_ARCHITECTURES)
    make = CUDAExtension if cuda else CppExtension
    module = make(
        f"minidisp.{ops.file_stem()}",
        [f"csrc/{path.name}" for path in ops.sources(cuda)],
        extra_compile_args={
            "cxx": [*ops.CXX_FLAGS, *(["-DMINIDISP_CUDA"] if cuda else [])],
            "nvcc": list(ops.NVCC_FLAGS),
        },
        extra_link_args=["-fopenmp"],
        optional=os.environ.get("MINIDISP_BUILD") != "1",  # a failed build is a warning
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)}}


options = {}
if os.environ.get("MINIDISP_BUILD") != "0" and os.name == "posix" and sys.platform != "darwin":
    try:
        options = extension()
    except ImportError as error:
        if os.environ.get("MINIDISP_BUILD") == "1":
            raise SystemExit(
                f"building the extension needs torch: install it, then use --no-build-isolation ({error})"
            ) from None
        print(
            f"minidisp: the extension is not built ahead ({error}); use --no-build-isolation to build it",
            file=sys.stderr,
        )
setup(**options)

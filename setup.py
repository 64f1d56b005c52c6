"""Prebuilds the extension: pip install --no-build-isolation -e .

Without torch or a compiler, only the Python part is installed; minidisp/ops/ then builds the extension on first use, or
uses the streamed implementation. MINIDISP_BUILD=0 skips the extension, MINIDISP_BUILD=1 makes a failed build an error.
"""

import os
import shlex
import sys
import tempfile
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:  # would fail with a page of errors about pyproject.toml
    sys.exit(
        f"installing minidisp needs setuptools 77 or later, not {setuptools.__version__}: "
        "omit --no-build-isolation, or run pip install -U setuptools torch first"
    )


def compiler_environment(command: list[str], folder: Path) -> dict[str, str]:
    """The environment that makes torch compile with `command`. Writes a script into folder.

    torch expects CXX to be the path of one program. A script in PATH can run any command, and its name has no spaces.
    The other variables stop torch from prepending ccache, and from asking the first word of CXX for its version.
    """
    script = folder / "minidisp-c++"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    script.chmod(0o700)
    path = os.pathsep.join([str(folder), os.environ.get("PATH", os.defpath)])
    return {"CXX": script.name, "PATH": path, "TORCH_NO_COMPILER_WRAPPER": "1", "TORCH_DONT_CHECK_COMPILER_ABI": "1"}


def extension(tools: Path) -> dict:
    """The arguments with which setup() builds the extension. tools: an empty folder that exists during the build."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    from minidisp.ops import build

    if os.environ.get("CXX") and build.compiler():
        os.environ.update(compiler_environment(build.compiler(), tools))
    cuda = build.builds_cuda()
    if cuda and not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", build.CUDA_ARCHITECTURES)
    make = CUDAExtension if cuda else CppExtension
    module = make(
        f"minidisp.{build.file_stem(build.builds_cuda())}",
        [os.path.relpath(path, build.PACKAGE.parent) for path in build.sources(cuda)],
        extra_compile_args={
            "cxx": [*build.CXX_FLAGS, "-fopenmp"],
            # torch's own flags would turn off the conversions of 16-bit numbers.
            "nvcc": [*build.NVCC_FLAGS, *(f"-U__CUDA_NO_{name}_CONVERSIONS__" for name in ("HALF", "BFLOAT16"))],
        },
        extra_link_args=["-fopenmp", "-s"],
        py_limited_api=True,  # uses no Python API, so one wheel serves every version
        optional=os.environ.get("MINIDISP_BUILD") != "1",  # a failed build is only a warning
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


options = {}
tools = tempfile.TemporaryDirectory()
if os.environ.get("MINIDISP_BUILD") != "0" and os.name == "posix" and sys.platform != "darwin":
    try:
        options = extension(Path(tools.name))
    except ImportError as error:
        if os.environ.get("MINIDISP_BUILD") == "1":
            raise SystemExit(
                f"building the extension needs torch: install it, then use --no-build-isolation ({error})"
            ) from None
        print(
            f"minidisp: the extension is not prebuilt ({error}); use --no-build-isolation to build it",
            file=sys.stderr,
        )
with tools:
    setuptools.setup(**options)

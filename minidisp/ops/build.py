"""The extension, csrc/ compiled: where it lies, how it is found, and how it is built on first use.

It is looked for in this order: built ahead by `pip install --no-build-isolation -e .`, in the folder of the package;
built before, in torch's cache of extensions. Else it is built into that cache, in a process of its own, where there are
a C++ compiler and ninja. A failed build is remembered. find() and find_or_build() never raise, as training goes on
without the extension: what they return says why there is none.
"""

import contextlib
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parents[1]
SOURCE_FOLDER = PACKAGE.parent / "csrc"
CXX_FLAGS = ("-O3", "-std=c++20", "-fno-math-errno", "-fopenmp")  # at::parallel_for is serial without OpenMP
NVCC_FLAGS = ("-O3", "-std=c++20", "-ftz=true")  # numbers below 1e-38 are 0, or every root would ask for them
CUDA_ARCHITECTURES = "8.0;9.0+PTX"  # where no GPU is visible to ask; newer ones compile the PTX
EXPECTED_SECONDS = {False: 60, True: 180}  # without and with CUDA
BINARY = "minidisp_fused.so"  # in the cache
CUDA_LOG = "build-cuda.log"  # there, if what was built leaves CUDA out because that failed
OTHER_FOLDER = "set TORCH_EXTENSIONS_DIR to a folder of your own"


@dataclass(frozen=True)
class Extension:
    """The extension as this process has it."""

    path: Path | None  # it is loaded from there; None: there is none
    about: str  # how it came: "built ahead", "built before", "built now in 14 s"; or why there is none
    note: str = ""  # on one built ahead that does not fit
    can_build: bool = False  # nothing is there yet, and nothing known speaks against building it


def has_sources() -> bool:
    """Whether csrc/ lies beside the package. It does in a clone; a wheel comes without it."""
    return (SOURCE_FOLDER / "dispersion.h").is_file()


def sources(cuda: bool) -> list[Path]:
    return sorted(path for path in SOURCE_FOLDER.glob("*.c*") if cuda or path.suffix == ".cpp")


def builds_cuda() -> bool:
    """Whether the extension is compiled for CUDA too: there is a kernel, PyTorch has CUDA, and nvcc is there.

    MINIDISP_CUDA=0 or 1 overrides the last two.
    """
    if not any(SOURCE_FOLDER.glob("*.cu")):
        return False
    wanted = os.environ.get("MINIDISP_CUDA")
    return (
        wanted == "1" if wanted else bool(torch.version.cuda and (shutil.which("nvcc") or os.environ.get("CUDA_HOME")))
    )


def file_stem(cuda: bool) -> str:
    """Of the extension built ahead, with CUDA or without. The name contains everything that the binary depends on, so an
    old one is never loaded."""
    digest = hashlib.sha256("\0".join((*CXX_FLAGS, *NVCC_FLAGS, str(cuda))).encode())
    for path in sorted(SOURCE_FOLDER.glob("*.*")):
        digest.update(path.name.encode() + path.read_bytes())
    return f"_fused_{torch.__version__.replace('.', '_').replace('+', '_')}_{digest.hexdigest()[:12]}"


def fitting() -> list[bool]:
    """With CUDA or without: what may be loaded, the best first. One with CUDA also fits where nvcc is missing now: on
    clusters, only some machines have it."""
    wanted = builds_cuda()
    return [True, False] if torch.version.cuda and "MINIDISP_CUDA" not in os.environ and not wanted else [wanted]


# The tools


def compiler() -> list[str]:
    """The command that compiles C++: CXX, a program that may have arguments ("ccache g++"), else one from the path.

    Empty if there is none, or if there is not the one that CXX names.
    """
    wanted = os.environ.get("CXX", "").strip()
    if not wanted:
        return [path for path in map(shutil.which, ("c++", "g++", "clang++")) if path][:1]
    if path := shutil.which(wanted):  # as a whole first: a path may have spaces
        return [os.path.abspath(path)]
    try:
        program, *arguments = shlex.split(wanted)
    except ValueError:  # a quotation mark that is not closed
        return []
    path = shutil.which(program)
    return [os.path.abspath(path), *arguments] if path else []


def ninja() -> str | None:
    """The path of ninja. That of requirements.txt lies beside the interpreter, which need not be in the path."""
    return shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))


def missing_tool() -> str:
    """Why nothing can be compiled here; "" if it can."""
    if not compiler():
        wanted = os.environ.get("CXX", "").strip()
        return f"the C++ compiler that CXX names was not found: {wanted}" if wanted else "no C++ compiler was found"
    return "" if ninja() else "ninja was not found (pip install ninja)"


def compiler_environment(folder: Path) -> dict[str, str]:
    """What makes torch compile with compiler(). Writes a script into folder.

    torch takes CXX for the path of one program. A script in the path can be any command, and its name has no spaces.
    Nothing is put before it that CXX does not say: torch would put ccache there. That it works is seen from what it
    makes: torch would ask the first word for its version.
    """
    script = folder / "minidisp-c++"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(compiler())} "$@"\n')
    script.chmod(0o700)
    path = os.pathsep.join([str(folder), os.environ.get("PATH", os.defpath)])
    return {"CXX": script.name, "PATH": path, "TORCH_NO_COMPILER_WRAPPER": "1", "TORCH_DONT_CHECK_COMPILER_ABI": "1"}


def cuda_toolkit() -> str | None:
    """The folder of the CUDA toolkit: CUDA_HOME, or where nvcc says that it is; None if it does not say.

    torch takes it for the folder above nvcc's, where nvcc may be a link or a script that calls another one.
    """
    named, nvcc = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    if named or not nvcc:
        return named
    try:
        said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    except OSError:  # it is no program; the build will say so
        return None
    found = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return os.path.normpath(found[1]) if found else None


# The cache


def cache_folder(cuda: bool | None = None) -> Path:
    """Where the extension is built on first use: one folder per torch, ABI, Python, compiler, flags and sources.

    cuda: with CUDA or without; None: as it would be built now.

    Raises OSError if there is no home folder for it.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not root:
        try:
            cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        except RuntimeError:  # neither HOME nor an entry in the list of users
            raise OSError("there is no home folder to build the extension in") from None
        root = Path(cache) / "torch_extensions"
    programs = [os.path.realpath(path) for path in map(shutil.which, compiler()) if path]
    stats = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in programs]
    parts = (
        file_stem(builds_cuda() if cuda is None else cuda), torch.compiled_with_cxx11_abi(), torch.version.cuda, platform.machine(), compiler(), stats,
        os.environ.get("TORCH_CUDA_ARCH_LIST"), os.environ.get("CUDA_HOME"),
    )  # fmt: skip
    return Path(os.path.abspath(root)) / f"minidisp_{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def make_cache_folder() -> Path:
    """The cache folder, which exists from now on. Raises OSError if it cannot be made, or as check_owner does."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o755)
    check_owner(folder)
    return folder


def check_owner(path: Path) -> None:
    """Raise OSError if another user, but root, could have written into a folder or file: what lies there is run."""
    found = path.stat()
    if found.st_uid not in (0, os.getuid()) or found.st_mode & 0o022:
        raise OSError(f"other users can write into {path}, so that nothing from there is run")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock goes with its process, however that ends."""
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def first_line(error: Exception) -> str:
    """One line about an error: an OSError's path and reason, or the first line of what it says."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return (str(error) or type(error).__name__).splitlines()[0]


def child_environment(**changes: str) -> dict[str, str]:
    """For a child process that runs `python -m minidisp.ops`, wherever this one was started."""
    paths = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    # Safe: a module in the working folder that has the name of another one is not seen by train.py, either.
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1", **changes}


# Finding and building


@functools.cache
def find() -> Extension:
    """Load the extension if it has been built; nothing is built."""
    if os.environ.get("MINIDISP_FUSED") == "0":
        return Extension(None, "MINIDISP_FUSED=0 is set")
    ahead = sorted(PACKAGE.glob("_fused_*.so"))
    stems = [file_stem(cuda) for cuda in fitting()]
    prefixes = stems if has_sources() else [stems[0].rsplit("_", 1)[0] + "_"]
    note = "; the one built ahead is for another torch or other sources" if ahead else ""
    for path in (path for prefix in prefixes for path in ahead if path.name.startswith(prefix)):
        found = _load(path, "built ahead")
        if found.path:
            return found
        note = f"; {found.about}"
    if not has_sources():
        return Extension(None, "there is neither an extension for this torch nor its sources", note)
    if os.name != "posix" or sys.platform == "darwin":
        return Extension(None, f"the extension is not built on {platform.system()}", note)
    try:
        folder = next((f for f in map(cache_folder, fitting()) if (f / "done").exists()), None)
        if folder is None:
            return Extension(None, "the extension has not been built", note, can_build=True)
        check_owner(folder)
        if (folder / BINARY).exists():
            check_owner(folder / BINARY)
    except OSError as error:
        return Extension(None, f"{first_line(error)}; {OTHER_FOLDER}", note)
    return _load(folder / BINARY, "built before", note)


@functools.cache
def find_or_build(device_type: str) -> Extension:
    """Load the extension, and build it first if that kind of device needs it: a minute, with CUDA up to three."""
    found = find()
    if not found.can_build:
        return found
    if device_type == "cuda" and not builds_cuda():
        return Extension(None, "nvcc, which the extension needs for CUDA, was not found", found.note)
    if missing := missing_tool():
        return Extension(None, missing, found.note)
    try:
        folder = make_cache_folder()
        with locked(folder / "minidisp.lock"):
            about = "built before"  # by another process, while this one waited
            if not (folder / "done").exists() and not (folder / "build.log").exists():
                about = _build(folder)
            if not (folder / "done").exists():
                failure = f"the extension did not build; see {folder / 'build.log'} (delete it to try again)"
                return Extension(None, failure, found.note)
    except OSError as error:
        return Extension(None, f"{first_line(error)}; {OTHER_FOLDER}", found.note)
    return _load(folder / BINARY, about, found.note)


def _load(path: Path, about: str, note: str = "") -> Extension:
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return Extension(None, f"{path} does not load: {first_line(error)}", note)
    if (log := path.parent / CUDA_LOG).exists():
        note += f"; its CUDA part did not build, see {log} (delete that folder to try again)"
    return Extension(path, about, note)


def _build(folder: Path) -> str:
    """Compile in a child process, which leaves BINARY and "done" in folder, or build.log. Says how long it took.

    If it fails with CUDA (an nvcc of another version, a card that is too old), it is tried again without.
    """
    seconds = EXPECTED_SECONDS[builds_cuda()]
    print(f"minidisp: compiling the extension, once, in about {seconds} s", file=sys.stderr, flush=True)
    start = time.monotonic()
    environment = child_environment(**compiler_environment(folder))
    environment["PATH"] = os.pathsep.join([environment["PATH"], str(Path(ninja()).parent)])
    if not shutil.which(environment.get("CC", "")):
        environment.pop("CC", None)  # given to nvcc as the path of one program, too
    if builds_cuda() and (toolkit := cuda_toolkit()):
        environment["CUDA_HOME"] = toolkit
    if builds_cuda() and not torch.cuda.is_available():
        environment.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    command = [sys.executable, "-m", "minidisp.ops", "compile", str(folder)]
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    (folder / CUDA_LOG).unlink(missing_ok=True)
    if child.returncode and builds_cuda():
        (folder / CUDA_LOG).write_bytes(child.stdout)
        print(
            f"minidisp: the CUDA part did not build, see {folder / CUDA_LOG}; compiling for the CPU alone",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        environment["MINIDISP_CUDA"] = "0"
        child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if child.returncode:
        (folder / "build.log").write_bytes(child.stdout + b"\nexit code %d\n" % child.returncode)
    else:
        (folder / "done").touch()
    return f"built now in {time.monotonic() - start:.0f} s"


def compile_into(folder: Path) -> None:
    """Compile to folder / BINARY, in this process, and load it to see that it can be. What torch raises, ends it."""
    from torch.utils import cpp_extension  # slow to import, hence only here

    (folder / "lock").unlink(missing_ok=True)  # torch's own, which a killed process leaves behind
    cuda = builds_cuda()
    cpp_extension.load(
        Path(BINARY).stem,
        [str(path) for path in sources(cuda)],
        extra_cflags=[*CXX_FLAGS, *(["-DMINIDISP_CUDA"] if cuda else [])],
        extra_cuda_cflags=list(NVCC_FLAGS),
        extra_ldflags=["-fopenmp"],
        build_directory=str(folder),
        with_cuda=cuda,
        is_python_module=False,
    )
    (folder / BINARY).chmod(0o755)  # whatever the user's umask: see check_owner

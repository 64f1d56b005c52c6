"""The extension, csrc/ compiled: where it is, how it is found, and how it is built on first use.

It is looked for in this order: prebuilt by `pip install --no-build-isolation -e .`, in the folder of the package; cached,
in torch's cache of extensions. Otherwise it is compiled into that cache, if there is a C++ compiler: for the instruction
set of this processor alone, or for all of them if MINIDISP_CPU is set. A failed build is remembered for a day. find() and
find_or_build() only raise InputError for an unknown MINIDISP_CPU, as training continues without the extension: what they
return says why there is none.
"""

import contextlib
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from minidisp import InputError
from minidisp.runtime.files import write_atomic

PACKAGE = Path(__file__).resolve().parents[1]
SOURCE_FOLDER = PACKAGE.parent / "csrc"
CXX_FLAGS = ("-O3", "-std=c++20", "-fno-math-errno", "-fPIC")
BINDINGS_FLAGS = (
    "-O1",
    "-std=c++20",
    "-fopenmp",
    "-fPIC",
    "-DAT_PER_OPERATOR_HEADERS",
)  # where compiling takes longest
NVCC_FLAGS = ("-O3", "-std=c++20", "-ftz=true")  # numbers below 1e-38 are 0, or every root would ask for them
CUDA_ARCHITECTURES = "8.0;9.0+PTX"  # where no GPU is visible to ask; newer ones compile the PTX
INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "amx")  # each includes all before it; csrc/cpu/host.h numbers them so
# About the CPU seconds of each file, for one instruction set and for all: for the order, and the time left at first. GCC 12 on a
# busy EPYC; those of the CUDA files are guesses.
SECONDS = {"bindings": (40, 40), "attention": (8, 15), "dispersion": (6, 12), "layers": (4, 9), "attention_amx": (1, 4),
           "dispersion_amx": (1, 4), "dispersion.cu": (100, 100), "cross_entropy.cu": (40, 40)}  # fmt: skip
BINARY = "minidisp_fused.so"  # in the cache; DONE holds its checksum
DONE = "done"
LOG = "build.log"  # there, of a build that failed
CUDA_LOG = "build-cuda.log"  # there, if what was built leaves CUDA out because that failed
REMEMBERED_SECONDS = 24 * 3600  # for which a failed build is not tried again
# What a compiler says that ran out of memory or disk, or was killed: the same build may succeed the next time.
TRANSIENT = ("no space left on device", "virtual memory exhausted", "out of memory", "cannot allocate memory",
             "terminated program", "killed")  # fmt: skip
OTHER_FOLDER = "set TORCH_EXTENSIONS_DIR to a folder of your own"


@dataclass(frozen=True)
class Extension:
    """The extension as this process has it."""

    path: Path | None  # it is loaded from there; None: there is none
    about: str  # where it is from: "prebuilt", "cached", "compiled now in 14 s"; or why there is none
    note: str = ""  # on a prebuilt one that does not fit
    can_build: bool = False  # nothing is there yet, and nothing known speaks against building it


def has_sources() -> bool:
    """Whether csrc/ lies beside the package. It does in a clone; a wheel comes without it."""
    return (SOURCE_FOLDER / "dispersion.h").is_file()


def sources(cuda: bool) -> list[Path]:
    return [
        path for kind in ("cpu", *(["cuda"] if cuda else [])) for path in sorted((SOURCE_FOLDER / kind).glob("*.c*"))
    ]


def wanted_instruction_set() -> str:
    """The one instruction set to compile for: this processor's highest; or "all", if MINIDISP_CPU is set or none is known.

    Raises InputError if MINIDISP_CPU names none.
    """
    asked = os.environ.get("MINIDISP_CPU", "")
    if asked and asked not in INSTRUCTION_SETS:
        raise InputError(
            f"MINIDISP_CPU is {asked}, but must be {', '.join(INSTRUCTION_SETS[:-1])} or {INSTRUCTION_SETS[-1]}"
        )
    return "all" if asked else processor_instruction_set()


@functools.cache
def processor_instruction_set() -> str:
    """The highest instruction set of this processor, as best_instruction_set() in csrc/cpu finds it; "all" if unknown."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "all"  # which is one: the vector code without x86's extensions
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "all"
    line = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    flags = set(line[1].split()) if line else set()
    if not flags:
        return "all"
    if flags >= {"avx512f", "avx512dq", "avx512bw", "avx512vl"}:
        return "amx" if flags >= {"amx_tile", "amx_bf16", "avx512_bf16"} else "avx512"
    return "avx2" if flags >= {"avx2", "fma"} else "baseline"


def builds_cuda() -> bool:
    """Whether the extension is compiled for CUDA too: there is a kernel, PyTorch has CUDA, and nvcc is there.

    MINIDISP_CUDA=0 or 1 overrides the last two.
    """
    if not any(SOURCE_FOLDER.glob("cuda/*.cu")):
        return False
    wanted = os.environ.get("MINIDISP_CUDA")
    return (
        wanted == "1" if wanted else bool(torch.version.cuda and (shutil.which("nvcc") or os.environ.get("CUDA_HOME")))
    )


def file_stem(cuda: bool) -> str:
    """Of the extension built ahead, with CUDA or without. The name contains everything that the binary depends on, so an
    old one is never loaded."""
    digest = hashlib.sha256("\0".join((*CXX_FLAGS, *BINDINGS_FLAGS, *NVCC_FLAGS, str(cuda))).encode())
    for path in sorted(SOURCE_FOLDER.rglob("*.*")):
        digest.update(path.relative_to(SOURCE_FOLDER).as_posix().encode() + path.read_bytes())
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


def missing_tool() -> str:
    """Why nothing can be compiled here; "" if it can."""
    if not compiler():
        wanted = os.environ.get("CXX", "").strip()
        return f"the C++ compiler that CXX names was not found: {wanted}" if wanted else "no C++ compiler was found"
    return ""


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
    """Where the extension is built on first use: one folder per torch, ABI, compiler, flags, sources and
    instruction set: machines with unlike processors may share a home folder.

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
        os.environ.get("TORCH_CUDA_ARCH_LIST"), os.environ.get("CUDA_HOME"), wanted_instruction_set(),
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
def locked(path: Path) -> Iterator[int]:
    """One process at a time; yields the descriptor. The lock lasts until all processes that have inherited it are gone."""
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


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


def checksum(path: Path) -> str:
    """Size and SHA-256 of a file, as a line."""
    content = path.read_bytes()
    return f"{len(content)} {hashlib.sha256(content).hexdigest()}\n"


def intact(folder: Path) -> bool:
    """Whether the binary in a cache folder is the one that was built there. Loading a truncated one would end the process."""
    try:
        return (folder / DONE).read_text() == checksum(folder / BINARY)
    except FileNotFoundError:
        return False


def is_whole(path: Path) -> bool:
    """Whether a shared library, of which no checksum is known, is as long as its ELF header says; True if it has none."""
    with open(path, "rb") as file:
        header = file.read(64)
        size = os.fstat(file.fileno()).st_size
    if header[:4] != b"\x7fELF":
        return size > 0
    if len(header) < 64 or header[4:6] != b"\x02\x01":  # cut off; or not of 64 bits, which the loader refuses by itself
        return len(header) == 64
    sections, entry, count = (int.from_bytes(header[a:b], "little") for a, b in ((40, 48), (58, 60), (60, 62)))
    return sections + entry * count <= size


def has_failed(folder: Path) -> bool:
    """Whether a build has failed here lately: its log is complete, and not older than a day."""
    try:
        log = folder / LOG
        complete = re.search(rb"\nexit code -?\d+\n\Z", log.read_bytes())
        return bool(complete) and abs(time.time() - log.stat().st_mtime) < REMEMBERED_SECONDS
    except FileNotFoundError:
        return False


# Finding and building


@functools.cache
def find() -> Extension:
    """Load the extension if it has been built; nothing is built."""
    if os.environ.get("MINIDISP_FUSED") == "0":
        return Extension(None, "MINIDISP_FUSED=0 is set")
    ahead = sorted(PACKAGE.glob("_fused_*.so"))
    stems = [file_stem(cuda) for cuda in fitting()]
    prefixes = stems if has_sources() else [stems[0].rsplit("_", 1)[0] + "_"]
    note = "; the prebuilt one is for another torch or other sources" if ahead else ""
    for path in (path for prefix in prefixes for path in ahead if path.name.startswith(prefix)):
        found = _load(path, "prebuilt")
        if found.path:
            return found
        note = f"; {found.about}"
    if not has_sources():
        return Extension(None, "there is neither an extension for this torch nor its sources", note)
    if os.name != "posix" or sys.platform == "darwin":
        return Extension(None, f"the extension is not built on {platform.system()}", note)
    try:
        folder = next((f for f in map(cache_folder, fitting()) if (f / DONE).exists()), None)
        if folder is None:
            return Extension(None, "the extension has not been built", note, can_build=True)
        check_owner(folder)
        if (folder / BINARY).exists():
            check_owner(folder / BINARY)
        if not intact(folder):
            note += f"; the one in {folder} was damaged"
            return Extension(None, "the extension has not been built", note, can_build=True)
    except OSError as error:
        return Extension(None, f"{first_line(error)}; {OTHER_FOLDER}", note)
    return _load(folder / BINARY, "cached", note)


@contextlib.contextmanager
def ahead(device_type: str) -> Iterator[None]:
    """Build the extension in the background, if there is none, for the first find_or_build(device_type); on leaving, a
    build that has not finished is stopped."""
    if not find().can_build:
        yield
        return
    in_background.set()
    pool = ThreadPoolExecutor(1)
    started[device_type] = pool.submit(_find_or_build, device_type)
    try:
        yield
    finally:
        stopping.set()
        pool.shutdown()
        stopping.clear()
        del started[device_type]


started: dict[str, Future] = {}  # by `ahead`, by kind of device
in_background, stopping = threading.Event(), threading.Event()


@functools.cache
def find_or_build(device_type: str) -> Extension:
    """Load the extension, and build it first if that kind of device needs it."""
    if device_type in started:
        in_background.clear()  # from now on somebody waits
        return started[device_type].result()
    return _find_or_build(device_type)


def _find_or_build(device_type: str) -> Extension:
    found = find()
    if not found.can_build:
        return found
    if device_type == "cuda" and not builds_cuda():
        return Extension(None, "nvcc, which the extension needs for CUDA, was not found", found.note)
    if missing := missing_tool():
        return Extension(None, missing, found.note)
    try:
        folder = make_cache_folder()
        with locked(folder / "minidisp.lock") as lock:
            about = "cached"  # by another process, while this one waited
            if not intact(folder) and not has_failed(folder):
                about = _build(folder, lock)
            if not intact(folder):
                known = f"did not build; see {folder / LOG} (delete it to try again)"
                why = known if has_failed(folder) else f"could not be built this time; see {folder / LOG}"
                return Extension(None, f"the extension {why}", found.note)
    except OSError as error:
        return Extension(None, f"{first_line(error)}; {OTHER_FOLDER}", found.note)
    return _load(folder / BINARY, about, found.note)


def _load(path: Path, about: str, note: str = "") -> Extension:
    try:
        if not is_whole(path):
            return Extension(None, f"{path} does not load: the file is cut off or empty", note)
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        why = first_line(error.__cause__ or error)  # torch wraps what the loader says
        return Extension(None, f"{path} does not load: {why}", note)
    if (log := path.parent / CUDA_LOG).exists():
        note += f"; its CUDA part did not build, see {log} (delete that folder to try again)"
    return Extension(path, about, note)


def _build(folder: Path, lock: int) -> str:
    """Compile into folder: BINARY and DONE, or LOG. Says how long it took.

    If it fails with CUDA (an nvcc of another version, a card that is too old), it is tried again without.
    """
    start = time.monotonic()
    for name in (DONE, BINARY, LOG, CUDA_LOG):
        (folder / name).unlink(missing_ok=True)
    for left_behind in folder.glob("compiling-*"):  # by a build that was killed
        shutil.rmtree(left_behind, ignore_errors=True)
    failure = compile_into(folder / BINARY, builds_cuda(), wanted_instruction_set(), lock)
    if failure is not None and builds_cuda():
        (folder / CUDA_LOG).write_bytes(failure.log)
        say(f"the CUDA part did not build, see {folder / CUDA_LOG}; compiling for the CPU alone")
        failure = compile_into(folder / BINARY, False, wanted_instruction_set(), lock)
    if failure is None:
        (folder / BINARY).chmod(0o755)  # whatever the user's umask: see check_owner
        write_atomic(folder / DONE, lambda file: file.write(checksum(folder / BINARY).encode()))
    else:
        last = b"exit code %d" % failure.code if not failure.transient else b"to be tried again"
        text = f"{failure.log.decode(errors='replace')}\n{last.decode()}\n"
        write_atomic(folder / LOG, lambda file: file.write(text.encode()))
    return f"compiled now in {time.monotonic() - start:.0f} s"


def say(text: str) -> None:
    if sys.stderr is not None:
        print(f"minidisp: {text}", file=sys.stderr, flush=True)


# Compiling


@dataclass(frozen=True)
class Failure:
    log: bytes  # the command, and what it said
    code: int

    @property
    def transient(self) -> bool:
        text = self.log.decode(errors="replace").lower()
        return self.code < 0 or any(words in text for words in TRANSIENT)


@dataclass(frozen=True)
class Unit:
    """A file to compile."""

    source: Path
    command: list[str]  # lacks -o
    expected: float  # CPU seconds


def units(cuda: bool, instruction_set: str) -> list[Unit]:
    """What is to be compiled, the longest first. Only bindings need torch's headers."""
    only = [] if instruction_set == "all" else [f"-DMINIDISP_ONLY={INSTRUCTION_SETS.index(instruction_set)}"]
    torch_include = Path(torch.__file__).parent / "include"
    headers = [f"-isystem{torch_include}", f"-isystem{torch_include / 'torch/csrc/api/include'}"]
    headers.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    result = []
    for source in sources(cuda):
        expected = SECONDS.get(source.stem if source.suffix == ".cpp" else source.name, (10, 10))[
            instruction_set == "all"
        ]
        if source.suffix == ".cu":
            command = [*nvcc_command(), "-c", str(source)]
        elif source.stem == "bindings":
            command = [*compiler(), *BINDINGS_FLAGS, *only, *headers, "-c", str(source)]
        else:
            command = [*compiler(), *CXX_FLAGS, *only, "-c", str(source)]
        result.append(Unit(source, command, expected))
    return sorted(result, key=lambda unit: -unit.expected)


def nvcc_command() -> list[str]:
    """nvcc with torch's own flags, for the visible GPU or TORCH_CUDA_ARCH_LIST."""
    from torch.utils import cpp_extension  # slow to import, hence only here

    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    toolkit = cuda_toolkit()
    program = str(Path(toolkit) / "bin" / "nvcc") if toolkit else shutil.which("nvcc") or "nvcc"
    includes = [f"-isystem={folder}" for folder in cpp_extension.include_paths("cuda")]
    host = ["-ccbin", compiler()[0]] if len(compiler()) == 1 else []
    return [program, *NVCC_FLAGS, *cpp_extension.COMMON_NVCC_FLAGS, *cpp_extension._get_cuda_arch_flags(), *includes, *host,
            "--compiler-options", "-fPIC"]  # fmt: skip


def link_command(objects: list[str], cuda: bool, out: Path) -> list[str]:
    folders, libraries = [str(Path(torch.__file__).parent / "lib")], ["c10", "torch_cpu"]
    if cuda:
        folders += [str(Path(toolkit) / "lib64")] if (toolkit := cuda_toolkit()) else []
        libraries += ["c10_cuda", "torch_cuda", "cudart"]
    return [*compiler(), "-shared", "-fopenmp", "-s", *objects, *(f"-L{folder}" for folder in folders),
            *(f"-l{name}" for name in libraries), "-o", str(out)]  # fmt: skip


def jobs() -> int:
    """How many files are compiled at once: a processor each, or MAX_JOBS."""
    asked = os.environ.get("MAX_JOBS", "")
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(asked) if asked.isdecimal() else available)


def compile_into(out: Path, cuda: bool, instruction_set: str, lock: int | None = None) -> Failure | None:
    """Compile and link; returns None, or the first failure.

    lock: a descriptor that the compilers inherit, so that it stays locked while one is left if this process is killed.
    """
    todo = units(cuda, instruction_set)
    running: dict[int, subprocess.Popen] = {}
    guard, stopped = threading.Lock(), threading.Event()

    def run(command: list[str]) -> Failure | None:
        with guard:
            if stopped.is_set():
                return None
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                pass_fds=[] if lock is None else [lock], env={**os.environ, "LC_ALL": "C", "TMPDIR": str(folder)},
            )  # fmt: skip
            running[child.pid] = child
        said = child.communicate()[0]
        with guard:
            del running[child.pid]
            if child.returncode:
                stopped.set()  # nothing more is begun
        return Failure(f"{shlex.join(command)}\n".encode() + said, child.returncode) if child.returncode else None

    def compile_unit(unit: Unit) -> Failure | None:
        return run([*unit.command, "-o", object_of(unit)])

    def object_of(unit: Unit) -> str:
        return str(folder / f"{unit.source.parent.name}-{unit.source.name}.o")

    with tempfile.TemporaryDirectory(prefix="compiling-", dir=out.parent, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        pool = ThreadPoolExecutor(jobs())
        try:
            progress = Progress(todo, instruction_set)
            waiting = {pool.submit(compile_unit, unit): unit for unit in todo}
            while waiting:
                if stopping.is_set():
                    return Failure(b"stopped, as the run ended", -signal.SIGTERM)
                done, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    progress.finished.append(waiting.pop(future))
                    if failure := future.result():
                        return failure
                progress.show()
            progress.end()
            linked = folder / out.name
            if failure := run(link_command([object_of(unit) for unit in todo], cuda, linked)):
                return failure
            with open(linked, "rb") as file:
                os.fsync(file.fileno())
            linked.replace(out)
            return None
        finally:
            with guard:
                stopped.set()
                for child in running.values():
                    child.terminate()
            pool.shutdown(cancel_futures=True)


class Progress:
    """The line that is shown while compiling: how many files are done, and the time left."""

    def __init__(self, todo: list[Unit], instruction_set: str):
        self.todo, self.finished = todo, []
        self.start = time.monotonic()
        self.terminal = sys.stderr is not None and sys.stderr.isatty()
        self.words = "compiling the extension, once" + ("" if instruction_set == "all" else f", for {instruction_set}")
        say(f"{self.words}: {len(todo)} files, about {self.left():.0f} s")

    def left(self) -> float:
        """Seconds: the work that is left at the speed so far, at first as it was measured when SECONDS was written."""
        workers = max(1, min(jobs(), len(self.todo)))
        total, done = (sum(unit.expected for unit in group) for group in (self.todo, self.finished))
        elapsed = time.monotonic() - self.start
        expected = max(total / workers, self.todo[0].expected)  # the longest file is compiled by one processor
        if not done:
            return max(1.0, expected - elapsed)
        return max(1.0, elapsed * (total / done - 1))

    def show(self) -> None:
        if self.terminal and not in_background.is_set():
            print(
                f"\r\033[Kminidisp: {self.words}: {len(self.finished)} of {len(self.todo)} files, about {self.left():.0f} s left",
                end="", file=sys.stderr, flush=True,
            )  # fmt: skip

    def end(self) -> None:
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

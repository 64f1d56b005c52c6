"""The extension compiled from csrc/: how it is found, and how it is built on first use.

It is searched for in this order: prebuilt by `pip install --no-build-isolation -e .`, in the package folder; cached, in
torch's extension cache. Otherwise it is compiled into that cache, if there is a C++ compiler: for this processor's
instruction set only, or for all of them if MINIDISP_CPU is set. A failed build is remembered for a day. find() and
find_or_build() raise InputError only for an unknown MINIDISP_CPU, since training continues without the extension: their
result gives the reason.
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
from collections.abc import Iterator, Sequence
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
NVCC_FLAGS = ("-O3", "-std=c++20", "-ftz=true")  # flushes numbers below 1e-38 to 0, or every root would test for them
CUDA_ARCHITECTURES = "8.0;9.0+PTX"  # if no GPU is visible; newer ones compile the PTX
INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "amx")  # each includes all before it; csrc/cpu/host.h numbers them so
# Approximate CPU seconds of each file, for one instruction set and for all, to order the files and to estimate the time
# left. Measured on an EPYC with GCC 12, those of the CUDA files with nvcc 13 for one kind of GPU.
SECONDS = {
    "cpu/bindings.cpp": (18, 18),
    "cpu/attention.cpp": (7, 15),
    "cpu/dispersion.cpp": (5, 10),
    "cpu/layers.cpp": (4, 12),
    "cpu/attention_amx.cpp": (1, 2),
    "cpu/dispersion_amx.cpp": (1, 2),
    "cuda/bindings.cpp": (16, 16),
    "cuda/dispersion.cu": (26, 26),
    "cuda/cross_entropy.cu": (6, 6),
}
BINARY = "minidisp_fused.so"  # in the cache; DONE holds its checksum
DONE = "done"
LOG = "build.log"  # in the cache, of a failed build
CUDA_LOG = "build-cuda.log"  # in the cache, if the extension was built without CUDA because that part failed
REMEMBERED_SECONDS = 24 * 3600  # a failed build is not tried again within this time
# Messages of a compiler that ran out of memory or disk space, or was killed: the same build may succeed the next time.
TRANSIENT = (
    "no space left on device",
    "virtual memory exhausted",
    "out of memory",
    "cannot allocate memory",
    "terminated program",
    "killed",
    "died due to signal",  # nvcc, of a part of it
)
OTHER_FOLDER = "set TORCH_EXTENSIONS_DIR to a folder of your own"


@dataclass(frozen=True)
class Extension:
    """The state of the extension in this process."""

    path: Path | None  # where it was loaded from; None if it is not available
    about: str  # its origin: "prebuilt", "cached", "compiled now in 14 s"; or why it is not available
    note: str = ""  # on a prebuilt one that does not match
    can_build: bool = False  # it has not been built yet, and there is no known obstacle


def has_sources() -> bool:
    """Whether csrc/ is next to the package, as in a clone; wheels do not contain it."""
    return (SOURCE_FOLDER / "dispersion.h").is_file()


def sources(cuda: bool) -> list[Path]:
    return [
        path for kind in ("cpu", *(["cuda"] if cuda else [])) for path in sorted((SOURCE_FOLDER / kind).glob("*.c*"))
    ]


def wanted_instruction_set() -> str:
    """The instruction set to compile for: this processor's highest, or "all" if it is unknown or MINIDISP_CPU is set.

    Raises InputError if MINIDISP_CPU is not an instruction set.
    """
    asked = os.environ.get("MINIDISP_CPU", "")
    if asked and asked not in INSTRUCTION_SETS:
        raise InputError(
            f"MINIDISP_CPU is {asked}, but must be {', '.join(INSTRUCTION_SETS[:-1])} or {INSTRUCTION_SETS[-1]}"
        )
    return "all" if asked else processor_instruction_set()


@functools.cache
def processor_instruction_set() -> str:
    """The highest instruction set of this processor, like best_instruction_set() in csrc/cpu; "all" if unknown."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "all"  # only one: the vector code without x86 extensions
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
    """Whether to compile the extension for CUDA too: if there are kernels, PyTorch has CUDA, and nvcc is found.

    MINIDISP_CUDA=0 or 1 overrides the last two conditions.
    """
    if not any(SOURCE_FOLDER.glob("cuda/*.cu")):
        return False
    wanted = os.environ.get("MINIDISP_CUDA")
    return (
        wanted == "1" if wanted else bool(torch.version.cuda and (shutil.which("nvcc") or os.environ.get("CUDA_HOME")))
    )


def file_stem(cuda: bool) -> str:
    """File stem of the prebuilt extension, with CUDA or without. It identifies everything that the binary depends on,
    so that an outdated one is never loaded."""
    digest = hashlib.sha256("\0".join((*CXX_FLAGS, *BINDINGS_FLAGS, *NVCC_FLAGS, str(cuda))).encode())
    for path in sorted(SOURCE_FOLDER.rglob("*.*")):
        digest.update(path.relative_to(SOURCE_FOLDER).as_posix().encode() + path.read_bytes())
    return f"_fused_{torch.__version__.replace('.', '_').replace('+', '_')}_{digest.hexdigest()[:12]}"


def fitting() -> list[bool]:
    """Which builds may be loaded, with CUDA or without, in order of preference. One with CUDA is also accepted if nvcc
    is missing now: on clusters, only some machines have it."""
    wanted = builds_cuda()
    return [True, False] if torch.version.cuda and "MINIDISP_CUDA" not in os.environ and not wanted else [wanted]


# The tools


def compiler(variable: str = "CXX", names: Sequence[str] = ("c++", "g++", "clang++")) -> list[str]:
    """The C++ compiler command: CXX, which may have arguments ("ccache g++"), or the first one of `names` in PATH.

    Empty if there is none, or if the one in CXX is not found. variable: another one instead of CXX.
    """
    wanted = os.environ.get(variable, "").strip()
    if not wanted:
        return [path for path in map(shutil.which, names) if path][:1]
    if path := shutil.which(wanted):  # the whole string first, since a path may contain spaces
        return [os.path.abspath(path)]
    try:
        program, *arguments = shlex.split(wanted)
    except ValueError:  # unbalanced quotation mark
        return []
    path = shutil.which(program)
    return [os.path.abspath(path), *arguments] if path else []


def missing_tool() -> str:
    """Why the extension cannot be compiled here; "" if it can."""
    if not compiler():
        wanted = os.environ.get("CXX", "").strip()
        return f"the C++ compiler in CXX was not found: {wanted}" if wanted else "no C++ compiler was found"
    return ""


def cuda_toolkit() -> str | None:
    """The folder of the CUDA toolkit: CUDA_HOME, or the one that nvcc reports; None if unknown.

    torch assumes the parent of nvcc's folder, but nvcc may be a link, or a script that calls another one.
    """
    named, nvcc = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    if named or not nvcc:
        return named
    try:
        said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    except OSError:  # not an executable; the build will report it
        return None
    found = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return os.path.normpath(found[1]) if found else None


def gpu_architectures() -> str | tuple[tuple[int, int], ...]:
    """What the CUDA files are compiled for: TORCH_CUDA_ARCH_LIST, or the compute capabilities of the visible GPUs, or
    CUDA_ARCHITECTURES if there are none.
    """
    if named := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return named
    if not torch.cuda.is_available():
        return CUDA_ARCHITECTURES
    return tuple(sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}))


# The cache


def cache_folder(cuda: bool | None = None) -> Path:
    """The folder in which the extension is built on first use: one per torch version, ABI, compiler, flags, sources,
    instruction set and kind of GPU, since machines with different processors and GPUs may share a home folder.

    cuda: with CUDA or without; None: as it would be built now. Raises OSError if there is no home folder.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not root:
        try:
            cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        except RuntimeError:  # neither HOME nor a passwd entry
            raise OSError("there is no home folder to build the extension in") from None
        root = Path(cache) / "torch_extensions"
    programs = [os.path.realpath(path) for path in map(shutil.which, compiler()) if path]
    stats = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in programs]
    if cuda is None:
        cuda = builds_cuda()
    parts = (
        file_stem(cuda),
        torch.compiled_with_cxx11_abi(),
        torch.version.cuda,
        platform.machine(),
        compiler(),
        stats,
        gpu_architectures() if cuda else None,
        os.environ.get("CUDA_HOME"),
        wanted_instruction_set(),
    )
    return Path(os.path.abspath(root)) / f"minidisp_{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def make_cache_folder() -> Path:
    """Create the cache folder and return it. Raises OSError if it cannot be created, or as check_owner does."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o755)
    check_owner(folder)
    return folder


def check_owner(path: Path) -> None:
    """Raise OSError if a user other than root could have written to a folder or file whose code will be executed."""
    found = path.stat()
    if found.st_uid not in (0, os.getuid()) or found.st_mode & 0o022:
        raise OSError(f"other users can write to {path}, so code from there is not executed")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """A lock between processes; yields its descriptor. It lasts until all processes that inherit it have ended."""
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def first_line(error: Exception) -> str:
    """One line about an error: an OSError's path and reason, or the first line of its message."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return (str(error) or type(error).__name__).splitlines()[0]


def child_environment(**changes: str) -> dict[str, str]:
    """The environment of a child process that runs `python -m minidisp.ops` from any working folder."""
    paths = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]
    # PYTHONSAFEPATH: modules in the working folder must not shadow others, as they do not in train.py.
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1", **changes}


def checksum(path: Path) -> bytes:
    """Size and SHA-256 of a file, as a line."""
    content = path.read_bytes()
    return f"{len(content)} {hashlib.sha256(content).hexdigest()}\n".encode()


def intact(folder: Path) -> bool:
    """Whether the binary in a cache folder is the one built there. Loading a truncated one would kill the process."""
    try:
        return (folder / DONE).read_bytes() == checksum(folder / BINARY)
    except FileNotFoundError:
        return False


def is_whole(path: Path) -> bool:
    """Whether a shared library has the length given in its ELF header, for files without a checksum."""
    with open(path, "rb") as file:
        header = file.read(64)
        size = os.fstat(file.fileno()).st_size
    if header[:4] != b"\x7fELF":
        return size > 0
    if len(header) < 64 or header[4:6] != b"\x02\x01":  # truncated, or not 64-bit, which the loader rejects itself
        return len(header) == 64
    sections, entry, count = (int.from_bytes(header[a:b], "little") for a, b in ((40, 48), (58, 60), (60, 62)))
    return sections + entry * count <= size


def has_failed(folder: Path) -> bool:
    """Whether a build has failed here recently: its log is complete and less than a day old."""
    try:
        log = folder / LOG
        complete = re.search(rb"\nexit code -?\d+\n\Z", log.read_bytes())
        return bool(complete) and abs(time.time() - log.stat().st_mtime) < REMEMBERED_SECONDS
    except FileNotFoundError:
        return False


# Finding and building


@functools.cache
def find() -> Extension:
    """Load the extension if it has been built; does not build it."""
    if os.environ.get("MINIDISP_FUSED") == "0":
        return Extension(None, "MINIDISP_FUSED=0 is set")
    ahead = sorted(PACKAGE.glob("_fused_*.so"))
    stems = [file_stem(cuda) for cuda in fitting()]
    prefixes = stems if has_sources() else [stems[0].rsplit("_", 1)[0] + "_"]
    note = "; the prebuilt one is for another version of torch or of the sources" if ahead else ""
    for path in (path for prefix in prefixes for path in ahead if path.name.startswith(prefix)):
        found = _load(path, "prebuilt")
        if found.path:
            return found
        note = f"; {found.about}"
    if not has_sources():
        return Extension(None, "there is no extension for this version of torch, and no sources to build it", note)
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
    """If necessary, build the extension in the background for the first find_or_build(device_type). On exit, an
    unfinished build is stopped."""
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


started: dict[str, Future] = {}  # builds started by `ahead`, by device type
in_background, stopping = threading.Event(), threading.Event()


@functools.cache
def find_or_build(device_type: str) -> Extension:
    """Load the extension; build it first if necessary for that type of device."""
    if device_type in started:
        in_background.clear()  # from now on, the caller waits for it
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
                known = f"failed to build; see {folder / LOG} (delete it to try again)"
                why = known if has_failed(folder) else f"could not be built this time; see {folder / LOG}"
                return Extension(None, f"the extension {why}", found.note)
    except OSError as error:
        return Extension(None, f"{first_line(error)}; {OTHER_FOLDER}", found.note)
    return _load(folder / BINARY, about, found.note)


def _load(path: Path, about: str, note: str = "") -> Extension:
    try:
        if not is_whole(path):
            return Extension(None, f"{path} does not load: the file is truncated or empty", note)
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        why = first_line(error.__cause__ or error)  # torch wraps the loader's error
        return Extension(None, f"{path} does not load: {why}", note)
    if (log := path.parent / CUDA_LOG).exists():
        note += f"; its CUDA part failed to build, see {log} (delete that folder to try again)"
    return Extension(path, about, note)


def _build(folder: Path, lock: int) -> str:
    """Compile into folder: BINARY and DONE, or LOG. Returns a text with the time that it took.

    If it fails with CUDA (nvcc of another version, a GPU that is too old), it is tried again without CUDA.
    """
    start = time.monotonic()
    for name in (DONE, BINARY, LOG, CUDA_LOG):
        (folder / name).unlink(missing_ok=True)
    for left_behind in folder.glob("compiling-*"):  # by a build that was killed
        shutil.rmtree(left_behind, ignore_errors=True)
    failure = compile_into(folder / BINARY, builds_cuda(), wanted_instruction_set(), lock)
    if failure is not None and builds_cuda():
        (folder / CUDA_LOG).write_bytes(failure.log)
        say(f"the CUDA part failed to build, see {folder / CUDA_LOG}; compiling for the CPU only")
        failure = compile_into(folder / BINARY, False, wanted_instruction_set(), lock)
    if failure is None:
        (folder / BINARY).chmod(0o755)  # independent of the user's umask; see check_owner
        write_atomic(folder / DONE, lambda file: file.write(checksum(folder / BINARY)))
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
    log: bytes  # the command and its output
    code: int

    @property
    def transient(self) -> bool:
        text = self.log.decode(errors="replace").lower()
        return self.code < 0 or any(words in text for words in TRANSIENT)


@dataclass(frozen=True)
class Unit:
    """A file to compile."""

    source: Path
    command: list[str]  # without -o
    expected: float  # CPU seconds


def units(cuda: bool, instruction_set: str) -> list[Unit]:
    """The files to compile, in order of decreasing time. Only the bindings need torch's headers."""
    only = [] if instruction_set == "all" else [f"-DMINIDISP_ONLY={INSTRUCTION_SETS.index(instruction_set)}"]
    torch_include = Path(torch.__file__).parent / "include"
    headers = [f"-isystem{torch_include}", f"-isystem{torch_include / 'torch/csrc/api/include'}"]
    headers.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    result = []
    for source in sources(cuda):
        name = source.relative_to(SOURCE_FOLDER).as_posix()
        expected = SECONDS.get(name, (10, 10))[instruction_set == "all"]
        if source.suffix == ".cu":
            command = [*nvcc(), *NVCC_FLAGS, *architecture_flags(), "--compiler-options", "-fPIC"]
        elif name == "cuda/bindings.cpp":  # nvcc passes it on to the compiler, together with the path of CUDA's headers
            command = [*nvcc(), "--forward-unknown-to-host-compiler", *BINDINGS_FLAGS, *headers]
        elif name == "cpu/bindings.cpp":
            command = [*compiler(), *BINDINGS_FLAGS, *only, *headers]
        else:
            command = [*compiler(), *CXX_FLAGS, *only]
        result.append(Unit(source, [*command, "-c", str(source)], expected))
    return sorted(result, key=lambda unit: -unit.expected)


def nvcc() -> list[str]:
    toolkit = cuda_toolkit()
    program = str(Path(toolkit) / "bin" / "nvcc") if toolkit else shutil.which("nvcc") or "nvcc"
    return [program, *(["-ccbin", compiler()[0]] if len(compiler()) == 1 else [])]


def architecture_flags() -> list[str]:
    """nvcc's flags for gpu_architectures()."""
    from torch.utils import cpp_extension  # slow to import, hence only here

    if os.environ.get("TORCH_CUDA_ARCH_LIST") or torch.cuda.is_available():
        return cpp_extension._get_cuda_arch_flags()
    os.environ["TORCH_CUDA_ARCH_LIST"] = CUDA_ARCHITECTURES
    try:
        return cpp_extension._get_cuda_arch_flags()
    finally:
        del os.environ["TORCH_CUDA_ARCH_LIST"]  # or a child process would look in another cache folder


def link_command(objects: list[str], cuda: bool, out: Path) -> list[str]:
    folders, libraries = [str(Path(torch.__file__).parent / "lib")], ["c10", "torch_cpu"]
    if cuda:
        folders += [str(Path(toolkit) / "lib64")] if (toolkit := cuda_toolkit()) else []
        libraries += ["c10_cuda", "torch_cuda", "cudart"]
    found = [*(f"-L{folder}" for folder in folders), *(f"-l{name}" for name in libraries)]
    return [*compiler(), "-shared", "-fopenmp", "-s", *objects, *found, "-o", str(out)]


def jobs() -> int:
    """The number of files compiled in parallel: one per processor, or MAX_JOBS."""
    asked = os.environ.get("MAX_JOBS", "")
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(asked) if asked.isdecimal() else available)


def compile_into(out: Path, cuda: bool, instruction_set: str, lock: int | None = None) -> Failure | None:
    """Compile and link; returns None, or the first failure.

    lock: a descriptor that the compilers inherit, so that it stays locked until they end if this process is killed.
    """
    todo = units(cuda, instruction_set)
    running: dict[int, subprocess.Popen] = {}
    guard, stopped = threading.Lock(), threading.Event()

    def run(command: list[str]) -> Failure | None:
        with guard:
            if stopped.is_set():
                return None
            try:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=[] if lock is None else [lock],
                    env={**os.environ, "LC_ALL": "C", "TMPDIR": str(folder)},
                )
            except OSError as error:  # such as a CUDA_HOME without nvcc
                return Failure(str(error).encode(), 127)
            running[child.pid] = child
        said = child.communicate()[0]
        with guard:
            del running[child.pid]
            if child.returncode:
                stopped.set()  # no further file is started
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
                    return Failure(b"stopped, since the run ended", -signal.SIGTERM)
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
    """The progress line while compiling: the number of finished files, and the time left."""

    def __init__(self, todo: list[Unit], instruction_set: str):
        self.todo, self.finished = todo, []
        self.start = time.monotonic()
        self.terminal = sys.stderr is not None and sys.stderr.isatty()
        self.words = "compiling the extension, once" + ("" if instruction_set == "all" else f", for {instruction_set}")
        say(f"{self.words}: {len(todo)} files, about {self.left():.0f} s")

    def left(self) -> float:
        """Estimated seconds left, from the speed so far, or initially from SECONDS."""
        workers = max(1, min(jobs(), len(self.todo)))
        total, done = (sum(unit.expected for unit in group) for group in (self.todo, self.finished))
        elapsed = time.monotonic() - self.start
        expected = max(total / workers, self.todo[0].expected)  # the longest file is compiled by one processor
        if not done:
            return max(1.0, expected - elapsed)
        return max(1.0, elapsed * (total / done - 1))

    def show(self) -> None:
        if self.terminal and not in_background.is_set():
            files = f"{len(self.finished)} of {len(self.todo)} files"
            line = f"\r\033[Kminidisp: {self.words}: {files}, about {self.left():.0f} s left"
            print(line, end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

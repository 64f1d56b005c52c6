"""The two fast implementations of the dispersion loss, as torch operators, and how the compiled one is found or built.

    minidisp::dispersion           fused: C++ in csrc/, angular_spread, orthogonalization, l2_repel, decorrelation
    minidisp::dispersion_streamed  streamed: plain PyTorch on strips of rows, on any device; those and perplexity_entropy

Both have the schema (z, variant, tau, clamp, eps, need_grad) -> (loss, gradient). The loss is a scalar, so one pass over the
pairs of tokens yields it together with its gradient, which backward only multiplies by a number. No T x T matrix is kept.
float64 z is computed in float64 (streamed only), all other dtypes in float32; loss and gradient come in the computing dtype.

The extension is looked for in this order: built ahead by `pip install --no-build-isolation -e .` and lying in this folder;
built before, or now, into torch's cache of extensions; none, and then streamed is in use. A failed build is remembered.
`python -m minidisp.ops` says which it is and why, and checks that it computes what it should. On a GPU that check comes by
itself, once, before the CUDA kernels are first used.
"""

import contextlib
import hashlib
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from minidisp import InputError

FUSED_VARIANTS = ("angular_spread", "orthogonalization", "l2_repel", "decorrelation")
STREAMED_VARIANTS = (*FUSED_VARIANTS, "perplexity_entropy")
IMPLEMENTATIONS = ("auto", "fused", "streamed", "reference")

# Streamed: strips of rows in plain PyTorch

STRIP_ELEMENTS = {"cpu": 2**19}  # of float32; what a strip of cosines may hold, to stay in the cache
STRIP_ELEMENTS_ELSEWHERE = 2**24  # 64 MB: fewer, larger kernels
LARGEST_EXPONENT = 80.0  # exp(-80) is still a normal float32


def _streamed(z: Tensor, variant: str, tau: float, clamp: float, eps: float, need_grad: bool) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        z = z if z.dtype == torch.float64 else z.float()
        by_distance = variant in ("l2_repel", "perplexity_entropy")
        pairs = _distance_pairs if by_distance else _cosine_pairs
        B, T, _ = z.shape
        budget = STRIP_ELEMENTS.get(z.device.type, STRIP_ELEMENTS_ELSEWHERE)
        group = min(B, max(1, budget // T**2))  # short sequences share a strip
        rows = min(T, max(1, budget // (T * group)), max(32, -(-T // 4)))  # a quarter: the lower triangle is left out
        loss = z.new_zeros((), dtype=torch.float64 if z.device.type != "mps" else torch.float32)
        grad = torch.empty_like(z, memory_format=torch.contiguous_format) if need_grad else z.new_empty(0)
        for start in range(0, B, group):
            part = slice(start, start + group)
            loss += pairs(z[part], variant, tau, clamp, eps, rows, grad[part] if need_grad else None)
        if need_grad:
            grad /= B
        loss = (loss / B).to(z.dtype)
        if variant == "l2_repel":
            loss += 0.1 * z.square().mean()
            if need_grad:
                grad.add_(z, alpha=0.2 / z.numel())
        return loss, grad


def _strips(u: Tensor, rows: int, buffer: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """start, stop and the products u_i.u_j of the rows start <= i < stop with all j >= start, written over buffer."""
    G, T, _ = u.shape
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        strip = buffer[: G * (stop - start) * (T - start)].view(G, stop - start, T - start)
        torch.bmm(u[:, start:stop], u[:, start:].mT, out=strip)
        yield start, stop, strip


def _sum_both(strip: Tensor) -> Tensor:
    """Sum per sequence of a strip that stands for its mirror image as well, but for the square at its beginning."""
    rows = strip.shape[1]
    return strip.sum(dim=(1, 2)) * 2 - strip[:, :, :rows].sum(dim=(1, 2))


def _apply_both(out: Tensor, start: int, stop: int, strip: Tensor, u: Tensor) -> None:
    """out += W u for the symmetric W of which the strip holds the rows start to stop, from the diagonal on."""
    out[:, start:stop].baddbmm_(strip, u[:, start:])
    if stop < u.shape[1]:
        out[:, stop:].baddbmm_(strip[:, :, stop - start :].mT, u[:, start:stop])


def _cosine_pairs(
    z: Tensor, variant: str, tau: float, clamp: float, eps: float, rows: int, grad: Tensor | None
) -> Tensor:
    """Sum of the losses of the sequences z (G, T, C); grad, if any, is overwritten with its gradient."""
    G, T, _ = z.shape
    if variant == "decorrelation":
        rounding = 4 * torch.finfo(z.dtype).eps * z.abs().amax(dim=-1, keepdim=True)
        z = z - z.mean(dim=-1, keepdim=True)
        z.masked_fill_(z.abs().amax(dim=-1, keepdim=True) <= rounding, 0.0)  # constant: what is left is no direction
        eps = 0.0
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    length = norm + eps
    length.masked_fill_(length == 0, math.inf)
    u = z / length

    buffer = z.new_empty(G * rows * T)
    spare = torch.empty_like(buffer) if grad is not None and variant != "decorrelation" else None
    smallest = math.acos(1 - clamp)  # angle, in radians
    if variant == "angular_spread":
        shift = z.new_full((G, 1, 1), smallest)
        if (math.pi - 2 * smallest) / (math.pi * tau) > LARGEST_EXPONENT:  # then the smallest angle that occurs
            largest = z.new_full((G,), -2.0)
            for _, _, strip in _strips(u, rows, buffer):
                strip.diagonal(dim1=1, dim2=2).fill_(-2.0)
                largest = torch.maximum(largest, strip.amax(dim=(1, 2)))
            shift = largest.clamp_(clamp - 1, 1 - clamp).acos_().view(G, 1, 1)

    total = z.new_zeros(G)
    if grad is not None:
        grad.zero_()
    for start, stop, strip in _strips(u, rows, buffer):
        diagonal = strip.diagonal(dim1=1, dim2=2)
        if variant == "decorrelation":
            diagonal.zero_()
            # Row by row, as sums of very many equal values round all in the same direction.
            total += 2 * torch.linalg.vector_norm(strip, dim=2).square().sum(dim=1)
            total -= torch.linalg.vector_norm(strip[:, :, : stop - start], dim=2).square().sum(dim=1)
        else:
            strip.clamp_(clamp - 1, 1 - clamp).acos_()
            sine = torch.sin(strip, out=spare[: strip.numel()].view_as(strip)) if grad is not None else None
            if variant == "angular_spread":
                strip.sub_(shift).mul_(-1 / (math.pi * tau)).exp_()
                diagonal.zero_()
                total += _sum_both(strip)
                if grad is not None:
                    strip.div_(sine)
            else:
                strip.mul_(-1 / math.pi).add_(0.5).relu_()
                diagonal.zero_()
                if grad is not None:
                    torch.div(strip, sine, out=sine)
                total += _sum_both(strip.square_())
                strip = sine
        if grad is not None:
            _apply_both(grad, start, stop, strip, u)

    pairs = T * (T - 1)
    if variant == "angular_spread":
        loss = (total / pairs).log() - shift.view(G) / (math.pi * tau)
        scale = (2 / (math.pi * tau) / total).view(G, 1, 1)
    else:
        loss = total / pairs
        scale = 4 / pairs if variant == "decorrelation" else 4 / (math.pi * pairs)
    if grad is not None:  # through u = z / (norm + eps), and through the centring
        grad.mul_(scale)
        radial = (z * grad).sum(dim=-1, keepdim=True) / (norm * length.square()).masked_fill_(norm == 0, math.inf)
        grad.div_(length).addcmul_(z, radial, value=-1)
        if variant == "decorrelation":
            grad.sub_(grad.mean(dim=-1, keepdim=True)).masked_fill_(norm == 0, 0.0)
    return loss.sum()


def _distance_pairs(
    z: Tensor, variant: str, tau: float, clamp: float, eps: float, rows: int, grad: Tensor | None
) -> Tensor:
    """As _cosine_pairs. Like the reference in float64, where the device has it, with the mean token at the origin."""
    G, T, _ = z.shape
    wide = z.to(torch.float32 if z.device.type == "mps" else torch.float64)
    wide = wide - wide.mean(dim=1, keepdim=True)
    square = wide.square().sum(dim=-1)  # (G, T)
    buffer = wide.new_empty(G * rows * T)
    wide_grad = torch.zeros_like(wide) if grad is not None else None

    if variant == "l2_repel":
        total, degree = wide.new_zeros(G), wide.new_zeros(G, T, 1)
        for start, stop, strip in _strips(wide, rows, buffer):
            strip.mul_(2).sub_(square[:, start:stop, None]).sub_(square[:, None, start:])
            strip.diagonal(dim1=1, dim2=2).zero_()  # instead of rounding errors
            strip.mul_(1 / tau).clamp_(max=0).exp_()
            total += _sum_both(strip)
            if wide_grad is not None:
                _apply_both(wide_grad, start, stop, strip, wide)
                degree[:, start:stop, 0] += strip.sum(dim=2)
                degree[:, stop:, 0] += strip[:, :, stop - start :].sum(dim=1)
        if grad is not None:
            wide_grad.addcmul_(degree, wide, value=-1).mul_((4 / tau / total).view(G, 1, 1))
            grad.copy_(wide_grad)
        return (total / T**2).log().sum()

    total, spare = wide.new_zeros(()), torch.empty_like(buffer)
    for start in range(0, T, rows):  # whole rows: p_ij is not symmetric
        stop = min(start + rows, T)
        here = wide[:, start:stop]
        p = torch.bmm(here, wide.mT, out=buffer[: G * (stop - start) * T].view(G, stop - start, T))
        p.mul_(2).sub_(square[:, None]).sub_(square[:, start:stop, None]).mul_(1 / tau)
        p.diagonal(start, dim1=1, dim2=2).fill_(-math.inf)
        p.sub_(p.amax(dim=2, keepdim=True)).exp_()
        p.div_(p.sum(dim=2, keepdim=True))
        h = torch.add(p, 0.01, out=spare[: p.numel()].view_as(p))
        if grad is None:
            total += h.log2_().mul_(p).sum()
            continue
        slope = p / h  # d/dp of p log2(p + 0.01) is log2(p + 0.01) + p / ((p + 0.01) ln 2)
        h.log2_()
        total += torch.dot(h.flatten(), p.flatten())
        h.add_(slope, alpha=1 / math.log(2))
        g = h.sub_(slope.copy_(h).mul_(p).sum(dim=2, keepdim=True)).mul_(p)
        wide_grad[:, start:stop].addcmul_(here, g.sum(dim=2, keepdim=True)).baddbmm_(g, wide, alpha=-1)
        wide_grad.addcmul_(wide, g.sum(dim=1).unsqueeze(2)).baddbmm_(g.mT, here, alpha=-1)
    if grad is not None:
        grad.copy_(wide_grad.mul_(-2 / (T * tau)))
    return total / T


# Both operators: shapes for the compiler, and backward


def _fake(z: Tensor, variant: str, tau: float, clamp: float, eps: float, need_grad: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    return z.new_empty((), dtype=dtype), z.new_empty(z.shape if need_grad else (0,), dtype=dtype)


def _save(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


def _backward(ctx, grad_loss: Tensor, _):
    if torch.is_grad_enabled():  # only under create_graph=True
        raise RuntimeError(
            "the fused and streamed dispersion losses have no second derivative: for create_graph=True use impl='reference'"
        )
    (grad,) = ctx.saved_tensors
    # Multiplied in float32 and then rounded, so that float16 profits from the scale of a gradient scaler.
    return ((grad * grad_loss).to(ctx.dtype), *[None] * 5)


def _register(name: str) -> None:
    torch.library.register_fake(name, _fake)
    torch.library.register_autograd(name, _backward, setup_context=_save)


torch.library.define(
    "minidisp::dispersion_streamed",
    "(Tensor z, str variant, float tau, float clamp, float eps, bool need_grad) -> (Tensor, Tensor)",
)
torch.library.impl("minidisp::dispersion_streamed", "CompositeExplicitAutograd")(_streamed)
_register("minidisp::dispersion_streamed")


def fused(z: Tensor, variant: str, tau: float, clamp: float, eps: float) -> Tensor:
    """The loss from the extension, which must have been loaded."""
    need_grad = torch.is_grad_enabled() and z.requires_grad
    return torch.ops.minidisp.dispersion(z, variant, tau, clamp, eps, need_grad)[0]


def streamed(z: Tensor, variant: str, tau: float, clamp: float, eps: float) -> Tensor:
    """The loss in plain PyTorch, in strips."""
    need_grad = torch.is_grad_enabled() and z.requires_grad
    return torch.ops.minidisp.dispersion_streamed(z, variant, tau, clamp, eps, need_grad)[0]


# The extension: found, or built

SOURCE_FOLDER = Path(__file__).resolve().parents[2] / "csrc"
CXX_FLAGS = ("-O3", "-std=c++20", "-fno-math-errno", "-fopenmp")  # at::parallel_for is serial without OpenMP
NVCC_FLAGS = ("-O3", "-std=c++20")
CUDA_ARCHITECTURES = "8.0;9.0+PTX"  # where no GPU is visible to ask; newer ones compile the PTX
EXPECTED_SECONDS = {False: 60, True: 180}  # without and with CUDA

_status: tuple[bool, str] | None = None  # whether the extension is loaded, and the line that says so
_cuda_status: tuple[bool, str] | None = None  # whether its CUDA kernels passed the check, likewise


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


def file_stem() -> str:
    """Of the extension built ahead. It names all that the binary depends on, so a stale one is not loaded, but left."""
    digest = hashlib.sha256("\0".join((*CXX_FLAGS, *NVCC_FLAGS, str(builds_cuda()))).encode())
    for path in sorted(SOURCE_FOLDER.glob("*")):
        digest.update(path.name.encode() + path.read_bytes())
    return f"_fused_{torch.__version__.replace('.', '_').replace('+', '_')}_{digest.hexdigest()[:12]}"


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")


def cache_folder() -> Path:
    """Where the extension is built on first use: one folder per torch, ABI, Python, compiler, flags and sources."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not root:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    compiler = _compiler()
    stat = os.stat(compiler) if compiler else None
    parts = (
        file_stem(), torch.compiled_with_cxx11_abi(), torch.version.cuda, platform.machine(), compiler,
        stat and (os.path.realpath(compiler), stat.st_size, stat.st_mtime_ns), os.environ.get("CXX"),
        os.environ.get("TORCH_CUDA_ARCH_LIST"), os.environ.get("CUDA_HOME"),
    )  # fmt: skip
    return Path(root) / f"minidisp_{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One builder at a time; the lock goes with its process, however that ends."""
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(folder: Path) -> None:
    """Build into folder/minidisp_fused.so with ninja, or raise an exception; what the compilers said is in the exception."""
    from torch.utils import cpp_extension  # slow to import, hence only here

    # ninja from requirements.txt lies beside the interpreter, which need not be in the path.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cuda = builds_cuda()
    if cuda and not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    (folder / "lock").unlink(missing_ok=True)  # torch's own, which a killed process leaves behind
    cpp_extension.load(
        "minidisp_fused",
        [str(path) for path in sources(cuda)],
        extra_cflags=[*CXX_FLAGS, *(["-DMINIDISP_CUDA"] if cuda else [])],
        extra_cuda_cflags=list(NVCC_FLAGS),
        extra_ldflags=["-fopenmp"],
        build_directory=str(folder),
        with_cuda=cuda,
        is_python_module=False,
    )


def _load(path: Path) -> None:
    if not hasattr(torch.ops.minidisp, "dispersion"):
        torch.ops.load_library(str(path))
    _register("minidisp::dispersion")


def _find() -> tuple[bool, str]:
    """Load the extension, building it if need be. Returns whether it is there, and one line about it."""
    if os.environ.get("MINIDISP_FUSED") == "0":
        return False, "streamed in PyTorch: MINIDISP_FUSED=0 is set"
    installed = sorted(Path(__file__).parents[1].glob("_fused_*.so"))
    stem = file_stem() if SOURCE_FOLDER.is_dir() else None
    prefix = stem or file_stem().rsplit("_", 1)[0] + "_"  # a wheel comes without the sources
    note = ""
    for path in installed:
        if path.name.startswith(prefix):
            try:
                _load(path)
                return True, f"fused, built ahead ({path.name})"
            except (OSError, RuntimeError) as error:
                note = f"; {path.name} does not load: {str(error).splitlines()[0]}"
    if installed and not note:
        note = "; the one built ahead is for another torch or other sources"
    if stem is None:
        return False, "streamed in PyTorch: there is neither an extension for this torch nor its sources" + note
    if os.name != "posix" or sys.platform == "darwin":
        return False, f"streamed in PyTorch: the extension is not built on {platform.system()}" + note

    folder = cache_folder()
    binary, log = folder / "minidisp_fused.so", folder / "build.log"
    way_out = "; MINIDISP_CUDA=0 builds it for the CPU alone" if builds_cuda() else ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "done").exists() and not log.exists() and not _compiler():
            return False, "streamed in PyTorch: no C++ compiler was found" + note
        with _locked(folder / "minidisp.lock"):
            if log.exists():
                failure = f"the extension did not build; see {log} (delete it to try again{way_out})"
                return False, f"streamed in PyTorch: {failure}{note}"
            built = not (folder / "done").exists()
            if built:
                print(
                    f"minidisp: compiling the extension, once, in about {EXPECTED_SECONDS[builds_cuda()]} s",
                    file=sys.stderr,
                    flush=True,
                )
                start = time.time()
                try:
                    _compile(folder)
                except Exception as error:  # whatever goes wrong, training goes on
                    log.write_text(str(error))
                    return False, f"streamed in PyTorch: the extension did not build; see {log}{way_out}{note}"
                (folder / "done").touch()
                how = f"built now in {time.time() - start:.0f} s"
            else:
                how = "built before"
        _load(binary)
        return True, f"fused, {how} ({binary}){note}"
    except (OSError, RuntimeError) as error:  # no place to write, or a binary that does not load
        return False, f"streamed in PyTorch: {str(error).splitlines()[0]}" + note


def _available(device: str) -> bool:
    """Whether the extension is loaded, now at the latest, and runs on that kind of device."""
    global _status
    if _status is None:
        _status = _find()
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device, "MPS")
    if not _status[0] or not torch._C._dispatch_has_kernel_for_dispatch_key("minidisp::dispersion", key):
        return False
    return device != "cuda" or _check_cuda()[0]


def _check_cuda() -> tuple[bool, str]:
    """Whether the CUDA kernels compute what they should on this kind of GPU, and one line about it.

    Tried once per build and GPU, in a child process: an illegal access would leave this one without CUDA.
    """
    global _cuda_status
    if _cuda_status is None:
        name, folder = torch.cuda.get_device_name(), cache_folder()
        log = folder / f"check-{re.sub(r'[^A-Za-z0-9]+', '-', name)}.log"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / "check.lock"):
                if not log.exists():
                    print(
                        f"minidisp: checking the CUDA kernels on this GPU ({name}), once", file=sys.stderr, flush=True
                    )
                    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
                    child = subprocess.run(
                        [sys.executable, "-m", "minidisp.ops", "check", f"cuda:{torch.cuda.current_device()}"],
                        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        text=True,
                    )
                    log.write_text(f"{child.stdout}{'passed' if child.returncode == 0 else 'FAILED'}\n")
                passed = log.read_text().endswith("passed\n")
            failure = f"the CUDA kernels failed their check on this GPU; see {log} (delete it to try again)"
            _cuda_status = passed, _status[1] if passed else f"streamed in PyTorch: {failure}"
        except OSError as error:  # no place to write
            _cuda_status = False, f"streamed in PyTorch: the CUDA kernels could not be checked: {error}"
    return _cuda_status


# torch.compile takes the answer for a constant instead of tracing the search for the extension. This is all that
# torch.compiler.assume_constant_result does, but that imports the compiler.
_available._dynamo_marked_constant = True


def check_name(impl: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise InputError(f"unknown dispersion impl {impl!r}: choose one of {', '.join(IMPLEMENTATIONS)}")


def resolve(impl: str, device: str) -> str:
    """What impl stands for on a kind of device ("cpu", "cuda", ...): fused, streamed or reference.

    May build the extension. Raises ValueError if impl is fused and the extension is not to be had.
    """
    check_name(impl)
    if impl in ("reference", "streamed"):
        return impl
    if _available(device):
        return "fused"
    if impl == "fused":
        raise InputError(f"impl='fused' cannot be used on {device}: {explain(device)}")
    return "streamed"


def explain(device: str) -> str:
    """One line: which of the two is in use on a kind of device, and why."""
    available = _available(device)
    if device == "cuda" and _cuda_status is not None:
        return _cuda_status[1]
    if _status[0] and not available:
        return f"streamed in PyTorch: the extension was built without {device}"
    return _status[1]


# The largest error that passes: of the loss, and of the gradient relative to its norm, which z's own type rounds.
SELF_TEST_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def self_test(impl: str, device: str) -> tuple[str, bool]:
    """One line with the errors of fused or streamed per dtype, and whether they are small enough.

    The truth is, in float64, the streamed implementation for fused, and the reference for streamed.
    """
    from minidisp import dispersion  # to the right of this file, but this is the top of a program of its own

    function = fused if impl == "fused" else streamed
    shapes = [(2, 150, 40), (3, 270, 33)]  # several tiles; features that can be read in place, and that cannot
    if torch.device(device).type == "cuda" and impl == "fused":
        shapes.append((1, 6000, 8))  # in strips
    texts, all_passed = [], True
    for dtype, tolerance in SELF_TEST_TOLERANCE.items():
        found = []
        for shape in shapes:
            z = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
            for variant in FUSED_VARIANTS if impl == "fused" else STREAMED_VARIANTS:
                exact = z.double().requires_grad_()
                if impl == "fused":
                    truth = streamed(exact, variant, 1.0, 0.25, 1e-2)
                else:
                    truth = dispersion.dispersion_loss(exact, variant, impl="reference")
                truth.backward()
                x = z.clone().requires_grad_()
                loss = function(x, variant, 1.0, 0.25, 1e-2)
                (2**16 * loss).backward()  # scaled, or float16 would underflow
                found.append((loss - truth).abs().item())
                found.append(((x.grad.double() / 2**16 - exact.grad).norm() / exact.grad.norm()).item())
        passed = all(error < tolerance for error in found)  # NaN does not
        all_passed &= passed
        worst = max(error if error == error else math.inf for error in found)
        texts.append(f"{str(dtype).removeprefix('torch.')} {worst:.0e}")
    return f"self-test of {impl}: errors {', '.join(texts)}: {'passed' if all_passed else 'FAILED'}", all_passed


def diagnosis() -> tuple[str, bool]:
    """What python -m minidisp.ops prints, and whether the self-test passed."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    lines = [
        f"torch     {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, {torch.get_num_threads()} threads",
        f"CUDA      torch {torch.version.cuda or 'without'}, nvcc {shutil.which('nvcc') or 'none'}, "
        + (torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU visible"),
        f"compiler  {_compiler() or 'none'}, ninja {shutil.which('ninja') or 'none in the path'}",
    ]
    passed = True
    for device in devices:
        lines.append(f"{device:9s} {explain(device)}")
        for impl in ("fused", "streamed"):
            if impl == "fused" and not _available(device):
                continue
            text, good = self_test(impl, device)
            passed &= good
            lines.append(f"          {text}")
    return "\n".join(lines), passed

"""Files and folders that are written atomically, and the log that one process at a time may write."""

import contextlib
import errno
import io
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from minidisp import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call write(temporary file), flush it to disk, then rename it: the file appears complete, or not at all.

    A link in the place of the temporary file or of the file itself is replaced, and what it points to stays as it is.
    Raises OSError naming `path` if the disk is full or cannot be written; then the file that was there before is intact.
    """
    temporary = path.with_name(path.name + ".tmp")
    file = None
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb", opener=_open_new) as raw:
            file = _Writer(raw)
            write(file)
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch.save turns what went wrong in write() into a RuntimeError about positions.
        failure = error if isinstance(error, OSError) else file and file.error
        if failure is None:
            raise
        raise OSError(failure.errno, failure.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):  # what went wrong before is the error to report
            temporary.unlink(missing_ok=True)


def _open_new(name: str, flags: int) -> int:
    """O_EXCL alone refuses a link; O_NOFOLLOW says so once more, for file systems that know only one of the two."""
    return os.open(name, flags | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)


class _Writer(io.RawIOBase):
    """Passes everything on to a file and remembers the first error."""

    def __init__(self, file: BinaryIO):
        self._file, self.error = file, None

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise


# What file systems answer that can flush files and not folders: CIFS, VirtualBox shares, some of FUSE.
_CANNOT_SYNC_FOLDERS = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def _sync_folder(folder: Path) -> None:
    """Flush a folder to disk: only then does a rename survive a power cut. Windows has no such call, nor have some file
    systems; the file itself is on the disk by then."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC_FOLDERS:
            raise
    finally:
        os.close(descriptor)


# A folder is built beside its final place and then renamed, so that it appears at once. Where that is impossible (a mount
# point, a link to a folder, a parent that is not writable), and in an empty folder that the user made, it is built inside.
_BUILDING, _READY = ".building", ".ready"
_UNIMPORTANT = {_BUILDING, _READY, ".lock", ".download", "lost+found"}  # the last is in the root of every ext4 volume


def is_free(folder: Path) -> bool:
    """Whether nothing is at this path but an empty folder, or one that holds unfinished work of ours alone."""
    if not folder.is_dir():
        return not os.path.lexists(folder)
    return all(path.name in _UNIMPORTANT for path in folder.iterdir())


def build_folder(folder: Path) -> Path:
    """The path of the folder in which the new content of `folder` is built until `put_in_place`: inside it or beside it."""
    beside, inside, old = folder.with_name(f".{folder.name}.building"), folder / _BUILDING, _old(folder)
    if not folder.exists():
        return beside
    if is_free(folder):
        return inside
    try:  # the only sure way to know is to do it
        os.rename(folder, old)
        os.rename(old, folder)
    except OSError:
        return inside
    return beside


def put_in_place(build: Path, folder: Path, last: str) -> None:
    """Make what was built the content of `folder`.

    last: the file by which a reader recognises a complete folder. Inside a folder that cannot be renamed, files replace
    those of the same name one by one: `last` is removed first and arrives last. If the process is killed meanwhile,
    `recover` completes it.
    """
    if build.parent == folder:
        (build / last).rename(build / f"{last}.last")
        build.rename(folder / _READY)
        _move_in(folder)
        return
    old = _old(folder)
    try:
        if folder.exists():
            folder.rename(old)
        build.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():  # between the two
            old.rename(folder)
        raise
    _sync_folder(folder.parent)
    if old.exists():
        shutil.rmtree(old)


def recover(folder: Path) -> None:
    """Complete, or undo, a `put_in_place` in which the process was killed. No other process may be in it."""
    old = _old(folder)
    if old.exists():
        shutil.rmtree(old) if folder.exists() else old.rename(folder)
    if (folder / _READY).exists():
        _move_in(folder)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _move_in(folder: Path) -> None:
    ready = folder / _READY
    for path in ready.glob("*.last"):  # there until everything else has been moved
        (folder / path.stem).unlink(missing_ok=True)
    for path in sorted(ready.iterdir(), key=lambda path: path.suffix == ".last"):
        os.replace(path, folder / path.name.removesuffix(".last"))
    _sync_folder(folder)
    ready.rmdir()


@contextlib.contextmanager
def new_folder(folder: Path, last: str) -> Iterator[Path]:
    """A folder to write files to; when the block ends, they are those of `folder`, which must be free (`is_free`).

    Checks first that files can be made there: OSError. If the block fails, nothing is left. last: see `put_in_place`.
    """
    build = build_folder(folder)
    shutil.rmtree(build, ignore_errors=True)  # of a process that was killed
    build.mkdir(parents=True)
    try:
        yield build
        put_in_place(build, folder, last)
    except BaseException:
        shutil.rmtree(build, ignore_errors=True)  # what went wrong before is the error to report
        raise


def open_log(path: Path, warn: Callable[[str], object]) -> BinaryIO:
    """metrics.jsonl, open for appending without a buffer, and locked until it is closed or the process is gone.

    Raises InputError if another process holds the lock, or if the path is a link or no file. Where the file system has no
    locks, `warn` is told.
    """
    file = open(path, "ab+", buffering=0, opener=_open_log)  # noqa: SIM115, outlives the call
    try:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path} is not a regular file: move it away, or give another --out")
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(1 << 30)  # a byte that is never written: on Windows, locked bytes cannot be read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if fcntl and not isinstance(error, BlockingIOError):
            warn(f"cannot lock {path} ({error.strerror}): do not train twice into this folder at the same time")
            return file
        file.close()
        raise InputError(
            f"{path.parent} is in use by another training: wait for it, stop it, or give another --out"
        ) from None
    except BaseException:
        file.close()
        raise
    if found.st_nlink > 1:  # it has a name elsewhere, too, as in backups by hard links: that one stays as it is
        with file:
            content = path.read_bytes()
            write_atomic(path, lambda copy: copy.write(content))
        return open_log(path, warn)
    return file


def _open_log(name: str, flags: int) -> int:
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe would wait for its other end
    try:
        return os.open(name, flags, 0o666)
    except OSError as error:
        if os.path.islink(name):
            raise InputError(f"{name} is a link: a run writes only files of its own; remove the link") from None
        raise error from None


def is_still(file: BinaryIO) -> bool:
    """Whether an open file is still the one that its name leads to: neither removed nor replaced."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(file.name))
    except OSError:
        return False


def append_line(file: BinaryIO, text: str) -> None:
    """Write a line at the end of an unbuffered file. Raises OSError naming the file."""
    data = memoryview((text + "\n").encode())
    try:
        while data:
            data = data[file.write(data) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from None


def remove_unfinished(run: Path) -> None:
    """Remove what a process that was killed has left half-written in a run folder; nobody else may be writing there.

    config.json.tmp stays until config.json is written: it shows that the folder belongs to a run.
    """
    for name in ("ckpt_*.pt", "*.json", "tokenizer.model", "wandb_id", "figures/*.png"):
        for stale in run.glob(name + ".tmp"):
            if stale.name != "config.json.tmp":
                stale.unlink()


def write_json(path: Path, values) -> None:
    """Write an object or list as indented JSON; NaN and infinities become null."""
    write_atomic(path, lambda file: file.write((to_json(values, indent=2) + "\n").encode()))


def to_json(values, indent: int | None = None) -> str:
    """The values as JSON, which knows no NaN and no infinity: they become null."""
    return json.dumps(_finite(values), indent=indent, allow_nan=False)


def _finite(values):
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values

"""Atomic writing of files and folders, and the log that only one process at a time may write."""

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
    """Write a file atomically: call write(temporary file), flush it to disk, then rename it to `path`.

    A link at `path` or at the temporary file's path is replaced; its target stays unchanged. Raises OSError naming
    `path` if the disk is full or not writable; a previous file then stays intact.
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
        # torch.save turns an error in write() into a RuntimeError about file positions.
        failure = error if isinstance(error, OSError) else file and file.error
        if failure is None:
            raise
        raise OSError(failure.errno, failure.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):  # the earlier error is the one to report
            temporary.unlink(missing_ok=True)


def _open_new(name: str, flags: int) -> int:
    """O_EXCL alone rejects a link; O_NOFOLLOW is added for file systems that support only one of the two."""
    return os.open(name, flags | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)


class _Writer(io.RawIOBase):
    """Forwards writes to a file and remembers the first error."""

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


# Errors of file systems that can sync files but not folders: CIFS, VirtualBox shares, some FUSE ones.
_CANNOT_SYNC_FOLDERS = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def _sync_folder(folder: Path) -> None:
    """Flush a folder to disk, so that a rename survives a power cut. Windows and some file systems cannot do this; the
    file itself is on disk by then."""
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


# A folder is built next to its final path and then renamed, so that it appears atomically. If that is impossible (a
# mount point, a link to a folder, a parent that is not writable), or the user created an empty folder, it is built
# inside.
_BUILDING, _READY = ".building", ".ready"
_UNIMPORTANT = {_BUILDING, _READY, ".lock", ".download", "lost+found"}  # the last is in the root of every ext4 volume


def is_free(folder: Path) -> bool:
    """Whether the path does not exist, or is a folder that is empty or contains only our own unfinished files."""
    if not folder.is_dir():
        return not os.path.lexists(folder)
    return all(path.name in _UNIMPORTANT for path in folder.iterdir())


def build_folder(folder: Path) -> Path:
    """The path of the folder, inside `folder` or next to it, where its new content is built until `put_in_place`."""
    beside, inside, old = folder.with_name(f".{folder.name}.building"), folder / _BUILDING, _old(folder)
    if link := next((path for path in (beside, inside) if path.is_symlink()), None):
        raise InputError(f"{link} is a link, which is never written through: remove the link")
    if not folder.exists():
        return beside
    if is_free(folder):
        return inside
    try:  # the only reliable test is to rename it
        os.rename(folder, old)
        os.rename(old, folder)
    except OSError:
        return inside
    return beside


def put_in_place(build: Path, folder: Path, last: str) -> None:
    """Make the files in `build` the content of `folder`.

    last: the file by which a reader recognises a complete folder. If the folder cannot be renamed, files of the same
    name are replaced one by one: `last` is removed first and moved in last. If the process is killed meanwhile,
    `recover` completes the move.
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
        if old.exists() and not folder.exists():  # failed between the two renames
            old.rename(folder)
        raise
    _sync_folder(folder.parent)
    if old.exists():
        shutil.rmtree(old)


def recover(folder: Path) -> None:
    """Complete or undo a `put_in_place` during which the process was killed. No other process may be running it."""
    old = _old(folder)
    if old.exists():
        shutil.rmtree(old) if folder.exists() else old.rename(folder)
    ready = folder / _READY
    if ready.is_dir() and not ready.is_symlink():  # through a link, files would be moved out of another folder
        _move_in(folder)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _move_in(folder: Path) -> None:
    ready = folder / _READY
    for path in ready.glob("*.last"):  # exists until everything else has been moved
        (folder / path.stem).unlink(missing_ok=True)
    for path in sorted(ready.iterdir(), key=lambda path: path.suffix == ".last"):
        os.replace(path, folder / path.name.removesuffix(".last"))
    _sync_folder(folder)
    ready.rmdir()


@contextlib.contextmanager
def new_folder(folder: Path, last: str) -> Iterator[Path]:
    """A folder to write files to; at the end of the block, they become those of `folder`, which must be free
    (`is_free`).

    Raises OSError at once if it cannot be created. If the block fails, nothing is left. last: see `put_in_place`.
    """
    build = build_folder(folder)
    shutil.rmtree(build, ignore_errors=True)  # of a process that was killed
    build.mkdir(parents=True)
    try:
        yield build
        put_in_place(build, folder, last)
    except BaseException:
        shutil.rmtree(build, ignore_errors=True)  # the earlier error is the one to report
        raise


def open_log(path: Path, warn: Callable[[str], object]) -> BinaryIO:
    """Open metrics.jsonl for unbuffered appending, locked until it is closed or the process ends.

    Raises InputError if another process holds the lock, or if the path is a link or not a regular file. If the file
    system does not support locks, `warn` is called.
    """
    file = open(path, "ab+", buffering=0, opener=open_own)  # noqa: SIM115, outlives the call
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
            warn(f"cannot lock {path} ({error.strerror}): do not start a second run in this folder at the same time")
            return file
        file.close()
        raise InputError(
            f"{path.parent} is in use by another run: wait for it, stop it, or give another --out"
        ) from None
    except BaseException:
        file.close()
        raise
    if found.st_nlink > 1:  # also linked elsewhere, as in hard-link backups, which must stay unchanged
        with file:
            content = path.read_bytes()
            write_atomic(path, lambda copy: copy.write(content))
        return open_log(path, warn)
    return file


def open_own(name: str, flags: int) -> int:
    """An `opener` for files that only minidisp writes. Raises InputError if the file is a link."""
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # opening a pipe would block
    try:
        return os.open(name, flags, 0o666)
    except OSError as error:
        if os.path.islink(name):
            raise InputError(f"{name} is a link, which is never written through: remove the link") from None
        raise error from None


def is_still(file: BinaryIO) -> bool:
    """Whether an open file is still the one at its path, that is, neither removed nor replaced."""
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
    """Remove half-written files of a killed process from a run folder. No other process may be writing there.

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
    """The values as JSON. NaN and infinities, which JSON does not have, become null."""
    return json.dumps(_finite(values), indent=indent, allow_nan=False)


def _finite(values):
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values

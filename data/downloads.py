"""The built-in corpora: Python's standard library, which needs no download, and texts that are downloaded once."""

import functools
import http.client
import io
import itertools
import platform
import re
import sysconfig
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data.files import Input, say
from data.sources import Document, Source, text_blocks, text_document, text_file
from minidisp import InputError
from minidisp.runtime.files import open_own
from minidisp.shards import sha256_of


def standard_library() -> Source:
    """The standard library of the running Python: real text that needs no download."""
    root = Path(sysconfig.get_path("stdlib"))
    # Without tests, third-party packages, and generated files: character tables and the text of help().
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
    paths = [path for path in root.rglob("*.py") if path.is_file() and not skipped & set(path.relative_to(root).parts)]
    if not paths:
        raise InputError(f"this Python has no library sources in {root}: choose another corpus")
    paths.sort(key=lambda path: path.relative_to(root).as_posix())
    description = f"standard library of {platform.python_implementation()} {platform.python_version()}"
    return Source(description, lambda: itertools.chain.from_iterable(map(text_file, paths)))


def wikitext(path: Path) -> Iterator[Document]:
    """The articles of a WikiText archive; one starts at the blank line before its " = Title = "."""
    with zipfile.ZipFile(path) as archive:
        for file_name in ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw"):
            member = next(name for name in archive.namelist() if name.endswith(file_name))
            with io.TextIOWrapper(archive.open(member), encoding="utf-8", newline="\n") as lines:
                article: list[str] = []
                for line in lines:
                    if re.fullmatch(r" = [^=].* = \n", line) and article and not article[-1].strip():
                        blank = article.pop()
                        if article:
                            yield text_document(member, "".join(article))
                        article = [blank]
                    article.append(line)
                yield text_document(member, "".join(article))


def tinystories(path: Path) -> Iterator[Document]:
    """The stories of TinyStoriesV2-GPT4-train.txt, without the line breaks around the separators."""
    rest = ""
    for block in itertools.chain(text_blocks(Input(path)), ["<|endoftext|>"]):
        *stories, rest = (rest + block).split("<|endoftext|>")
        yield from (text_document(str(path), story.strip()) for story in stories if story.strip())


class Download(NamedTuple):
    read: Callable[[Path], Iterator[Document]]
    url: str
    bytes: int
    sha256: str


# URLs with a commit hash, so that the files cannot change.
GITHUB, HUB = "https://raw.githubusercontent.com", "https://huggingface.co/datasets"
DOWNLOADS = {
    "shakespeare": Download(
        text_file,
        f"{GITHUB}/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt",
        1_115_394,
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "wikitext2": Download(
        wikitext,
        f"{HUB}/ggml-org/ci/resolve/927b3642933080f1b0e811e2f916e14c292992f9/wikitext-2-raw-v1.zip",
        4_721_645,
        "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
    ),
    "wikitext103": Download(
        wikitext,
        f"{HUB}/mattdangerw/wikitext-103-raw/resolve/3555105b17ae31cc619a136fac72dbe2865c3738/wikitext-103-raw-v1.zip",
        191_984_949,
        "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
    ),
    "tinystories": Download(
        tinystories,
        f"{HUB}/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/TinyStoriesV2-GPT4-train.txt",
        2_227_753_162,
        "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443",
    ),
}
BUILT_IN = ("pystdlib", *DOWNLOADS)


def built_in(name: str, downloads: Path, file: Path | None = None) -> Source:
    """A built-in corpus. downloads: the folder for downloads. file: use this file instead of downloading."""
    if name == "pystdlib":
        return standard_library()
    wanted = DOWNLOADS[name]

    @functools.cache  # the text is read several times, but downloaded and checked once
    def path() -> Path:
        if not file:
            return download(name, downloads)
        check_download(file, wanted)
        return file

    return Source(wanted.url, lambda: wanted.read(path()), [])


# --- downloads --------------------------------------------------------------------------------------------------------

ATTEMPTS, PAUSE_S, TIMEOUT_S = 5, 2, 30


def download(name: str, folder: Path) -> Path:
    """Download the file of a built-in corpus, or resume the download, and check it."""
    wanted = DOWNLOADS[name]
    target = folder / f"{name}-{wanted.url.rpartition('/')[2]}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        part.touch()
        by_hand = f"or download it elsewhere and run python data/prepare.py {name} --source FILE"
        for attempt in range(ATTEMPTS):
            if part.stat().st_size >= wanted.bytes:
                break
            time.sleep(PAUSE_S if attempt else 0)
            try:
                _download_rest(wanted, part)
            except urllib.error.HTTPError as error:
                raise InputError(f"{wanted.url}: HTTP {error.code} {error.reason}: try later, {by_hand}") from error
            except urllib.error.URLError as error:
                raise InputError(f"cannot reach {wanted.url} ({error.reason}): go online, {by_hand}") from error
            except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
                say(f"{wanted.url}: {error or 'connection lost'}")
        if (size := part.stat().st_size) < wanted.bytes:
            have = f"{size:,} of {wanted.bytes:,} bytes"
            raise InputError(f"{wanted.url}: connection lost after {have}: run this again to resume, {by_hand}")
        part.replace(target)
    try:
        check_download(target, wanted)
    except InputError:
        target.unlink()  # so that the next run downloads it again
        raise
    return target


def _download_rest(wanted: Download, part: Path) -> None:
    """Append the missing bytes to `part`; start over if the server does not support range requests."""
    have = part.stat().st_size
    request = urllib.request.Request(wanted.url, headers={"User-Agent": "minidisp", "Range": f"bytes={have}-"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        have = have if resumed else 0
        progress = tqdm(desc=part.stem, total=wanted.bytes, initial=have, unit="B", unit_scale=True, disable=None)
        with open(part, "ab" if resumed else "wb", opener=open_own) as file, progress:
            # Stop one block past the expected size, which is enough to show that it is another file.
            while have <= wanted.bytes and (block := _read(response)):
                file.write(block)
                have += len(block)
                progress.update(len(block))


def _read(response) -> bytes:
    try:
        return response.read(1 << 16)
    except OSError as error:  # a network error, not to be confused with a full disk
        raise ConnectionError(error) from error


def check_download(path: Path, wanted: Download) -> None:
    """Raise InputError unless the file has the size and sha256 of the original."""
    try:
        size, sha256 = path.stat().st_size, sha256_of(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    if (size, sha256) != (wanted.bytes, wanted.sha256):
        raise InputError(
            f"{path} is not the file of {wanted.url}: {size:,} bytes with sha256 {sha256}, "
            f"not {wanted.bytes:,} bytes with sha256 {wanted.sha256}"
        )

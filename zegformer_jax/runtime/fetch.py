"""Fetches files from the web, once, into the cache."""

import contextlib
import hashlib
import http.client
import os
import re
import sys
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

from tqdm import tqdm

from zegformer_jax._version import __version__
from zegformer_jax.runtime.environment import CACHE_VARIABLE, cache_folder
from zegformer_jax.runtime.errors import MissingFile, UserError

SCHEMES = ("https://", "http://")
FOLDER = "weights"  # of the cache; a file's place in it is its address
TIMEOUT = 60  # seconds that a server may be silent
BLOCK = 2**20  # bytes
HEADERS = {"User-Agent": f"zegformer_jax/{__version__}"}
IN_FRAGMENT = re.compile(r"sha256=([0-9a-f]{64})")
# PyTorch's: resnet50-0676ba61.pth. Eight digits that begin with 20 are a date.
IN_NAME = re.compile(r".*-(?!20\d{6}\.)([0-9a-f]{8,64})\.\w+")


def fetch(address: str, progress: bool = True) -> Path:
    """Returns the file of an address, from the cache or downloaded into it.

    The file's SHA-256 is checked if the address has it: whole at its end, `...#sha256=64 digits`,
    or its first digits in the file's name, as PyTorch publishes weights: `resnet50-0676ba61.pth`.
    Several processes may fetch a file at the same time.

    Args:
        address: An address that begins with one of `SCHEMES`.
        progress: Shows a progress bar, and a downloaded file's SHA-256.

    Raises:
        MissingFile: It is not in the cache and cannot be downloaded; the message has its place.
        UserError: Its SHA-256 is not the address's, or the address names no file.
    """
    path, expected = cached_path(address), expected_hash(address)
    if path.is_file():
        if expected:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            _compare(found, expected, path, "remove it, and it is fetched again")
        return path
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = _download(address, partial, progress)
        _compare(found, expected, address, "nothing is kept")
        partial.replace(path)
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        raise MissingFile(
            f"{address}: cannot be fetched ({error}): run the command again, or get the file on "
            f"another machine and copy it to {path}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    if progress:
        lines = (f"fetched {address}", f"  SHA-256 {found}", f"  into {path}")
        tqdm.write("\n".join(lines), file=sys.stderr)
    return path


def cached_path(address: str) -> Path:
    """Returns the place of an address's file in the cache, on a local disk.

    Raises:
        UserError: The address names no file, or there is no folder for the cache.
    """
    variables = dict(os.environ)
    if "://" in variables.get(CACHE_VARIABLE, ""):
        del variables[CACHE_VARIABLE]  # a bucket, but weights are read from a local file
    try:
        parts = urllib.parse.urlsplit(address)
        folder = Path(cache_folder(variables)) / FOLDER
    except ValueError as error:
        raise UserError(f"{address}: no address of a file: {error}") from error
    except RuntimeError as error:
        raise UserError(f"{address}: no folder to keep it in: set {CACHE_VARIABLE}") from error
    host = parts.netloc.rpartition("@")[2]
    *folders, name = [x for x in parts.path.split("/") if x not in ("", ".", "..")] or [""]
    if not host or not name or parts.path.endswith("/"):
        raise UserError(f"{address}: no address of a file")
    return folder.joinpath(host, *folders, f"{name}?{parts.query}" if parts.query else name)


def expected_hash(address: str) -> str:
    """Returns the SHA-256 in an address, or its first digits; "" if it has none.

    Raises:
        UserError: The address ends in something else after a `#`.
    """
    parts = urllib.parse.urlsplit(address)
    if parts.fragment:
        match = IN_FRAGMENT.fullmatch(parts.fragment.lower())
        if match is None:
            raise UserError(f"{address}: after # comes sha256= with 64 hexadecimal digits")
        return match[1]
    match = IN_NAME.fullmatch(parts.path)
    return match[1] if match else ""


def _download(address: str, path: Path, progress: bool) -> str:
    """Downloads a file and returns its SHA-256."""
    digest, size = hashlib.sha256(), 0
    request = urllib.request.Request(address, headers=HEADERS)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, path.open("xb") as file:
        if answer.headers.get_content_type() == "text/html":
            raise OSError("the answer is a web page, not a file")
        total = answer.length
        name = address.rpartition("/")[2]
        with tqdm(total=total, desc=name, unit="B", unit_scale=True, disable=not progress) as bar:
            while block := answer.read(BLOCK):
                file.write(block)
                digest.update(block)
                size += len(block)
                bar.update(len(block))
    if total is not None and size < total:
        raise OSError(f"cut off after {size:,} of {total:,} bytes")
    return digest.hexdigest()


def _compare(found: str, expected: str, where: object, then: str) -> None:
    if not found.startswith(expected):
        raise UserError(
            f"{where}: its SHA-256 is {found}, and should begin with {expected}: {then}"
        )

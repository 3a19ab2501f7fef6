"""The bytes of one remote file from an offset on, by HTTP, by what fsspec knows (s3), or from a command."""

import base64
import http.client
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

_CHUNK = 1 << 20
_RANGE = 8 << 20
_TEMPORARY = (408, 425, 429)  # and everything from 500 on


class TransferError(OSError):
    """A transfer that failed and may succeed when it is tried again."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RefusedError(OSError):
    """A transfer that will fail again: the file does not exist, access is refused, no reader is installed."""


@dataclass(frozen=True)
class Answer:
    """What a source gives: its bytes from `start` on."""

    start: int
    """The offset asked for, or 0 where the source cannot go on or holds another file by now."""
    total: int | None
    """Length of the whole file, None if the source does not say."""
    identity: str | None
    """What tells this content from another under the same URL; None if the source does not say."""
    chunks: Iterator[bytes]


def is_remote(spec: str) -> bool:
    """Tell whether `spec` has a scheme ("pipe:…", "https://…") rather than being a local path."""
    return re.match(r"^[A-Za-z][A-Za-z0-9+.-]*:", spec) is not None and not spec.startswith("file:")


def scheme_of(url: str) -> str:
    """Return "https", "s3", "pipe", …"""
    return url.split(":", 1)[0].lower()


def has_folders(url: str) -> bool:
    """Tell whether other files may be asked for beside `url`, such as a manifest; not so for commands."""
    return scheme_of(url) in ("http", "https") or not _is_webdatasets(scheme_of(url))


def without_password(url: str) -> str:
    """Return `url` for messages."""
    return re.sub(r"(?<=//)([^/@:]*):[^/@]*@", r"\1:…@", url)


@contextmanager
def open_at(url: str, offset: int, identity: str | None, timeout_s: float) -> Iterator[Answer]:
    """Open `url` from `offset` on, if it is still the content called `identity` (None: not known), else from 0 on.

    Raises TransferError for what is worth another try (also while its chunks are read), RefusedError for the rest.
    """
    scheme = scheme_of(url)
    if scheme in ("http", "https"):
        with _http(url, offset, identity, timeout_s) as answer:
            yield answer
    elif _is_webdatasets(scheme):
        with _command(url) as answer:
            yield answer
    else:
        yield _fsspec(url, offset, identity)


@contextmanager
def _http(url: str, offset: int, identity: str | None, timeout_s: float) -> Iterator[Answer]:
    url, headers = _authorized(url)
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if identity is not None:
            headers["If-Range"] = identity
    try:
        response = urlopen(Request(url, headers=headers), timeout=timeout_s)
    except HTTPError as error:
        error.close()
        if error.code == 416:  # the range lies behind the end: the file has become shorter
            raise TransferError("HTTP 416: the file has become shorter there; begun anew") from error
        said = f"HTTP {error.code} {error.reason}"
        if error.code in _TEMPORARY or error.code >= 500:
            raise TransferError(said, _seconds(error.headers.get("Retry-After"))) from error
        raise RefusedError(said) from error
    except (URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise TransferError(f"{reason or type(error).__name__}") from error
    with response:
        length = response.headers.get("Content-Length")
        total, start = None if length is None else int(length), 0
        if response.status == 206:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if found is None or int(found[1]) != offset:
                raise TransferError(f"the server answered with another range: {response.headers.get('Content-Range')}")
            start, total = offset, int(found[2])
        etag = response.headers.get("ETag")
        strong = etag is not None and not etag.startswith("W/")
        yield Answer(start, total, etag if strong else response.headers.get("Last-Modified"), _body(response))


def _body(response: Any) -> Iterator[bytes]:
    while True:
        try:
            chunk = response.read1(_CHUNK)  # what is here: a cut must not lose what came before it
        except http.client.IncompleteRead as error:
            raise TransferError("the connection was cut") from error
        except (http.client.HTTPException, OSError) as error:
            raise TransferError(f"the connection failed: {error or type(error).__name__}") from error
        if not chunk:
            return
        yield chunk


def _authorized(url: str) -> tuple[str, dict[str, str]]:
    """Return the URL without user and password, and the headers that carry them instead."""
    headers = {"User-Agent": "mvit", "Accept-Encoding": "identity"}
    parts = urlsplit(url)
    if parts.username is not None:
        secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(secret.encode()).decode()
        url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return url, headers


def _seconds(text: str | None) -> float:
    return float(text) if text is not None and text.isdigit() else 0.0


def _fsspec(url: str, offset: int, identity: str | None) -> Answer:
    """Read by ranges of a few MiB, each of which fsspec's own reader may try several times."""
    file_system, path = _file_system(url)
    with _fsspec_errors():
        file_system.invalidate_cache()
        info = file_system.info(path)
    total = int(info["size"])
    found = next((str(info[name]) for name in ("ETag", "etag", "LastModified", "mtime") if info.get(name)), None)
    start = offset if offset <= total and found is not None and found == identity else 0

    def chunks() -> Iterator[bytes]:
        for begin in range(start, total, _RANGE):
            with _fsspec_errors():
                chunk = file_system.cat_file(path, start=begin, end=min(begin + _RANGE, total))
            yield chunk

    return Answer(start, total, found, chunks())


def _file_system(url: str) -> tuple[Any, str]:
    scheme = scheme_of(url)
    way_out = f"or name a command that prints the file: pipe:aws s3 cp {url} -" if scheme == "s3" else "or use pipe:"
    try:
        import fsspec
        from fsspec.core import url_to_fs

        if scheme not in fsspec.available_protocols():
            raise RefusedError(f"no reader for {scheme}: (http, https, s3, pipe, and what fsspec knows), {way_out}")
        return url_to_fs(url)
    except ImportError as error:
        package = "pip install 'mvit[s3]'" if scheme == "s3" else str(error)
        raise RefusedError(
            f"{scheme}: URLs are read by fsspec, which lacks a package here: {package}, {way_out}"
        ) from error


@contextmanager
def _fsspec_errors() -> Iterator[None]:
    """Sort what fsspec's many readers raise; only some of it is an OSError."""
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise RefusedError(f"{type(error).__name__}: {error}") from error
    except Exception as error:
        if "Credentials" in type(error).__name__:
            raise RefusedError(f"{error}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile") from error
        raise TransferError(f"{type(error).__name__}: {error}") from error


def _is_webdatasets(scheme: str) -> bool:
    from webdataset.gopen import gopen_schemes

    return scheme in gopen_schemes and scheme != "__default__"


@contextmanager
def _command(url: str) -> Iterator[Answer]:
    """Read the output of a command (pipe:), or of the one that webdataset has for a scheme (gs, hf, scp, …)."""
    from webdataset.gopen import gopen

    def chunks(stream: Any) -> Iterator[bytes]:
        while chunk := stream.read(_CHUNK):
            yield chunk

    try:
        with gopen(url, "rb") as stream:  # closing raises if the command failed
            yield Answer(0, None, None, chunks(stream))
    except (TransferError, RefusedError):
        raise
    except (OSError, ValueError) as error:
        raise TransferError(str(error)) from error

"""Files from the web, kept in the user's cache: fetched once, in full or not at all.

Beside each lies a record of its size and checksums. While the size agrees the file is used without
asking the server again. Two processes may fetch the same file at once: each writes its own copy,
and the last one stays.
"""

import hashlib
import http.client
import json
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nfflax import __version__
from nfflax.folders import cache_folder
from nfflax.weights.errors import WeightsError
from nfflax.weights.whole import whole_file

Progress = Callable[[int, int], None]
"""Hears how many bytes have come, of how many in all: 0 where the server does not say."""

_SECONDS = 30  # without a byte from the server
_CHUNK = 1 << 20
_STATUS = {
    401: "it wants a login, which nfflax cannot give: download the file by hand",
    403: "it refuses access to this file",
    404: "it has no such file: look at the address again",
    410: "it does not have this file any more",
    429: "it has had too many requests: try again later",
}


@dataclass(frozen=True)
class Download:
    """A downloaded file and what is known of it."""

    url: str
    path: Path
    size: int
    sha256: str
    md5: str
    from_cache: bool


def download(url: str, progress: Progress = lambda _done, _all: None) -> Download:
    """A file from an http(s) address: from the cache, or else from its server."""
    path = _place(url)
    record = path.with_name(f"{path.name}.json")
    if (known := _cached(url, path, record)) is not None:
        return known
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"The cache folder cannot be made: {error.strerror or error}."
        raise WeightsError(str(path.parent), [problem]) from None
    with whole_file(path) as temporary:
        found = Download(url, path, *_fetched(url, temporary, progress), from_cache=False)
    with whole_file(record) as temporary:
        kept = {key: value for key, value in asdict(found).items() if key in _KEPT}
        temporary.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    return found


_KEPT = ("url", "size", "sha256", "md5")


def _place(url: str) -> Path:
    """Where a file is kept: by its own name, in a folder that its address names."""
    name = urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2]
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name[-100:])
    folder = hashlib.sha256(url.encode()).hexdigest()[:16]
    return cache_folder("weights") / folder / (safe.lstrip(".") or "weights")


def _cached(url: str, path: Path, record: Path) -> Download | None:
    """The file of an earlier download, if it is still as long as it was then."""
    try:
        known: dict[str, Any] = json.loads(record.read_text("utf-8"))
        if (known["url"], known["size"]) != (url, path.stat().st_size):
            return None
        return Download(**{key: known[key] for key in _KEPT}, path=path, from_cache=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _fetched(url: str, path: Path, progress: Progress) -> tuple[int, str, str]:
    """Download to `path`; (size, sha256, md5)."""
    done, sha256, md5 = 0, hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with _opened(url) as response, open(path, "wb") as file:
        if "html" in response.headers.get("Content-Type", ""):
            raise WeightsError(url, ["The server answers with a web page, not with a file."])
        total = _length(response)
        while chunk := _next(url, response, done):
            file.write(chunk)
            sha256.update(chunk)
            md5.update(chunk)
            done += len(chunk)
            progress(done, total)
    if total and done != total:
        problem = f"Only {done:,} of {total:,} bytes came. Nothing was kept; try again."
        raise WeightsError(url, [problem])
    if not done:
        raise WeightsError(url, ["The server's file is empty."])
    return done, sha256.hexdigest(), md5.hexdigest()


def _opened(url: str) -> http.client.HTTPResponse:
    request_headers = {"User-Agent": f"nfflax/{__version__}"}
    try:
        request = urllib.request.Request(url, headers=request_headers)
        return _opener().open(request, timeout=_SECONDS)
    except WeightsError:
        raise
    except urllib.error.HTTPError as error:
        error.close()
        # Of too many redirections the reason is a paragraph.
        message = _STATUS.get(error.code) or str(error.reason).partition("\n")[0].rstrip(".")
        problem = f"The server answers {error.code}: {message}."
    except urllib.error.URLError as error:
        problem = _unreachable(error.reason)
    except OSError as error:
        problem = _unreachable(error)
    except (http.client.HTTPException, ValueError) as error:
        problem = f"The address cannot be used: {error or type(error).__name__}."
    raise WeightsError(url, [problem])


def _next(url: str, response: http.client.HTTPResponse, done: int) -> bytes:
    """The next bytes; a broken connection must not look like a disk that is full."""
    try:
        return response.read(_CHUNK)
    except (OSError, http.client.HTTPException):
        problem = f"The connection broke after {done:,} bytes. Nothing was kept; try again."
        raise WeightsError(url, [problem]) from None


def _length(response: Any) -> int:
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() else 0


def _unreachable(reason: Any) -> str:
    if isinstance(reason, ssl.SSLError):
        return f"The connection is not safe: {reason}."
    why = "it does not answer" if isinstance(reason, TimeoutError) else reason
    return f"The server cannot be reached: {why}. Without a network, give a local file."


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to other addresses, but never from https to anything less."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str):
        if req.type == "https" and not newurl.lower().startswith("https:"):
            raise WeightsError(
                req.full_url, [f"It leads to {newurl}, which is not https: refused."]
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """Opens http and https and nothing else: no redirect leads to a local file or to ftp."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener

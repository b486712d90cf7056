"""Files from Hugging Face's hub, through its own package, cache and settings.

`HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` mean what they mean everywhere.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from nfflax import __version__
from nfflax.weights.download import Progress
from nfflax.weights.errors import WeightsError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
TORCH_WEIGHTS = "pytorch_model.bin"  # in repositories older than safetensors
# owner/repo, maybe @revision (a branch, tag or commit, or refs/pr/1), maybe /file.
_GRAMMAR = re.compile(
    r"(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>refs/(pr|convert)/[^/]+|[^/]+))?(/(?P<file>.+))?"
)


class HubPlace(NamedTuple):
    """What an `hf://` place names."""

    repo: str
    revision: str | None
    file: str | None


def parse_hub_place(place: str) -> HubPlace:
    """The parts of `hf://owner/repo[@revision][/file]`."""
    match = _GRAMMAR.fullmatch(place.removeprefix("hf://"))
    if match is None:
        problem = f"It is not of the form hf://owner/repo[@revision][/file]{_hint(place)}."
        raise WeightsError(place, [problem])
    return HubPlace(match["repo"], match["revision"], match["file"])


def _hint(place: str) -> str:
    name = place.removeprefix("hf://").strip("/")
    return f"; timm's weights are at hf://timm/{name}" if name and "/" not in name else ""


def fetch_from_hub(place: str, progress: Progress) -> tuple[Path, str]:
    """(file or folder, commit). A folder has a config.json and weights beside it."""
    found = parse_hub_place(place)
    if found.file is not None:
        path = _file(place, found, found.file, progress)
        if path is None:
            raise WeightsError(place, [f"{found.repo} has no file {found.file}."])
        return path, _commit(path)
    config = _file(place, found, CONFIG, progress)
    weights = _file(place, found, WEIGHTS, progress) or _file(place, found, TORCH_WEIGHTS, progress)
    if weights is None:
        wanted = f"{found.repo} has neither {WEIGHTS} nor {TORCH_WEIGHTS}"
        raise WeightsError(place, [f"{wanted}. Name one of its files: {place}/FILE."])
    return (weights if config is None else weights.parent), _commit(weights)


def _file(place: str, found: HubPlace, name: str, progress: Progress) -> Path | None:
    """One file of a repository; None where the repository does not have it."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        problem = 'It needs the huggingface-hub package: pip install "nfflax[hub]".'
        raise WeightsError(place, [problem]) from None
    try:
        path = huggingface_hub.hf_hub_download(
            found.repo,
            name,
            revision=found.revision,
            library_name="nfflax",
            library_version=__version__,
            tqdm_class=_reporting(progress),
        )
        return Path(path)
    except errors.LocalEntryNotFoundError as error:
        kept = huggingface_hub.try_to_load_from_cache(found.repo, name, revision=found.revision)
        if kept is huggingface_hub._CACHED_NO_EXIST:  # what the hub said when it was asked last
            return None
        offline = isinstance(error.__cause__, errors.OfflineModeIsEnabled)
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        problem = f"{name} is not in the local cache, and {why}."
    except errors.EntryNotFoundError:
        return None
    except errors.GatedRepoError:
        page = f"https://huggingface.co/{found.repo}"
        problem = f"Its owner wants terms accepted first: at {page}, then `hf auth login`."
    except errors.RepositoryNotFoundError:
        problem = f"The hub has no repository {found.repo}, or it is private: `hf auth login`."
    except errors.RevisionNotFoundError:
        problem = f"{found.repo} has no revision {found.revision}."
    except ValueError as error:  # the package's HFValidationError among others
        problem = f"It cannot be a file of the hub: {_first_line(error)}"
    except OSError as error:  # the network, the disk, other answers of the server
        problem = f"{name} cannot be fetched: {_first_line(error)}"
    raise WeightsError(place, [problem])


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__


def _commit(path: Path) -> str:
    """The commit that a file in the hub's cache belongs to: .../snapshots/COMMIT/path."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else ""


def _reporting(progress: Progress) -> Any:
    """A progress bar that shows nothing and tells `progress`."""
    from huggingface_hub.utils import tqdm

    class Reporting(tqdm):
        def __init__(self, *arguments: Any, **options: Any):
            self._done, self._all = options.get("initial") or 0, options.get("total") or 0
            super().__init__(*arguments, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self._done += n or 0
            progress(int(self._done), int(self._all))

    return Reporting

"""Folders of the Hugging Face hub as folders of this machine: "hf://owner/repository/folder"."""

import os
import re
from pathlib import Path
from typing import Any

from cutaway.artifacts import hub
from cutaway.artifacts.errors import CutawayError
from cutaway.subjects.atlas.shipped import shipped_dictionary

PREFIX = "hf://"
_SHIPPED = "atlas/"  # and a site: the dictionaries in the package
_ADDRESS = re.compile(r"^hf://([\w.-]+/[\w.-]+?)(?:@([^/?]+))?(?:/+([^?]*?))?/?(?:\?revision=(.+))?$")
_BESIDE = ("config.yaml", "config.json", "cfg.json", "hyperparams.json")


def local(where: str | Path) -> Path:
    """The path itself, or where the hub's client has put what an address names: that folder's files, or one file.

    An address is hf://owner/repository, @revision or ?revision= if wanted, and a folder or file in it. Only that folder
    is fetched, not what is below it (but for `checkpoints/final.safetensors`); without a network what an earlier call
    has left in the hub's cache. "atlas/blocks.3.resid_post" is a dictionary that ships with the
    package. Raises `CutawayError` when the path does not exist or the hub does not have it.
    """
    if not str(where).startswith(PREFIX):
        path = Path(where).expanduser()
        if is_shipped(where):
            return shipped_dictionary(str(where).removeprefix(_SHIPPED))
        if not os.path.exists(path):
            raise CutawayError(
                f"{path} does not exist: name a folder or file, or an address such as hf://owner/repository/folder"
            )
        return path
    match = _ADDRESS.match(str(where))
    if match is None or ".." in (match[3] or "").split("/"):
        raise CutawayError(f"{where} is no address: write hf://owner/repository/folder")
    repository, revision, inside = match[1], match[2] or match[4], (match[3] or "").strip("/")
    snapshot = _snapshot(repository, revision, inside, str(where))
    path = snapshot / inside
    if not path.exists():
        raise CutawayError(f"{repository} has no {inside} (or it is not in the cache, and there is no network)")
    return path


def is_shipped(where: str | Path) -> bool:
    """Whether that is the name of a dictionary in the package, and not of a folder here."""
    return str(where).startswith(_SHIPPED) and not os.path.exists(Path(where).expanduser())


def _snapshot(repository: str, revision: str | None, inside: str, where: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    base = f"{inside}/" if inside else ""
    above = inside.rpartition("/")[0]
    above = f"{above}/" if above else ""
    allowed = [f"{base}*", *([inside] if inside else []), *(f"{above}{name}" for name in _BESIDE)]
    # fnmatch's * goes through folders: everything below is left out, or a whole repository would be fetched
    below = [f"{base}*/*"] if "checkpoints" not in inside else []
    try:
        with hub.reached() as there:
            options: dict[str, Any] = {"revision": revision, "local_files_only": not there}
            folder = snapshot_download(repository, allow_patterns=allowed, ignore_patterns=below or None, **options)
            if Path(folder, inside, "hyperparams.json").is_file():
                weights = f"{base}checkpoints/final.safetensors"
                folder = snapshot_download(repository, allow_patterns=[weights], **options)
            return Path(folder)
    except LocalEntryNotFoundError as error:
        raise CutawayError(f"{where} is not in the cache of the hub's client, and the hub cannot be reached") from error
    except HfHubHTTPError as error:
        code = getattr(error.response, "status_code", "")
        raise CutawayError(f"the hub refused {repository} ({code}): see its name, or log in if it is gated") from error
    except (HFValidationError, OSError, ValueError) as error:
        raise CutawayError(f"{where} could not be fetched: {' '.join(str(error).split())[:200]}") from error

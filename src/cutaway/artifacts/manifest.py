"""Where an artifact came from: enough to make it again, and to notice that it is another one.

A `Manifest` names the model (id, revision, hash of its weights), the corpus, the configuration, the seed, the version
of the code and the artifacts it was made from. Its id is a hash of all that determines the result, so two artifacts
made in the same way have the same id, whenever and by whomever.
"""

import hashlib
import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from cutaway.artifacts.errors import BadFile
from cutaway.artifacts.files import plain

_CHUNK = 1 << 20


@dataclass(frozen=True)
class ModelIdentity:
    """Which model."""

    id: str
    """What it is loaded by: hub id or folder."""
    revision: str | None
    """The hub revision, if there is one."""
    weight_hash: str
    """SHA-256 of its weights."""

    @property
    def name(self) -> str:
        """What it is called: a folder by its own name, without the path that leads there; a hub id as it is."""
        return self.id if self.revision is not None else PurePath(self.id).name or self.id


@dataclass(frozen=True)
class Manifest:
    """The record that lies beside an artifact; make one with `Manifest.create`."""

    id: str
    """A hash of all that determines the result: neither the time nor the command line."""
    kind: str
    """What the artifact is: "dictionary", "tour", "activations"."""
    model: ModelIdentity | None
    """The model it was made with."""
    corpus_hash: str | None
    """SHA-256 of the text it was made from."""
    configuration: Mapping[str, Any]
    """The settings, as plain JSON."""
    seed: int | None
    """Of everything drawn at random."""
    version: str
    """Of the code, with the git commit when run from a checkout."""
    parents: tuple[str, ...]
    """Ids of the manifests it was made from."""
    created: str
    """UTC in ISO 8601."""
    command: str | None
    """The command line."""

    @classmethod
    def create(
        cls,
        kind: str,
        *,
        model: ModelIdentity | None = None,
        corpus_hash: str | None = None,
        configuration: Mapping[str, Any] | None = None,
        seed: int | None = None,
        parents: Sequence[str] = (),
        command: str | None = None,
    ) -> "Manifest":
        """A manifest of something made now by this version of the code.

        Args:
            kind: What the artifact is.
            model: The model it was made with.
            corpus_hash: SHA-256 of the text it was made from.
            configuration: The settings, as plain JSON; empty if None.
            seed: Of everything drawn at random.
            parents: Ids of the manifests it was made from.
            command: The command line.
        """
        settings = plain(configuration or {})
        version = code_version()
        return cls(
            id=_manifest_id(
                kind=kind,
                model=model,
                corpus_hash=corpus_hash,
                configuration=settings,
                seed=seed,
                version=version,
                parents=parents,
            ),
            kind=kind,
            model=model,
            corpus_hash=corpus_hash,
            configuration=settings,
            seed=seed,
            version=version,
            parents=tuple(parents),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            command=command,
        )

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON."""
        return {**asdict(self), "parents": list(self.parents)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Manifest":
        """The manifest that `to_json` wrote.

        Args:
            data: The mapping.

        Raises:
            BadFile: It is no manifest, or its id does not fit what it says.
        """
        if not isinstance(data, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise BadFile("the manifest is damaged: it is not an object")
        if not isinstance(data.get("model"), (Mapping, type(None))):
            raise BadFile("the manifest is damaged: its model is not an object")
        try:
            model = None if data["model"] is None else ModelIdentity(**data["model"])
            manifest = cls(**{**data, "model": model, "parents": tuple(data["parents"])})
        except (KeyError, TypeError) as error:
            raise BadFile(f"the manifest is damaged: {error.args[0]} is missing, unknown or of another type") from error
        _check_types(manifest)
        if manifest.id != manifest.recomputed_id():
            raise BadFile(f"the manifest {manifest.id[:12]} was changed after it was written: its id does not fit")
        return manifest

    def recomputed_id(self) -> str:
        """The id that the other fields give."""
        return _manifest_id(
            kind=self.kind,
            model=self.model,
            corpus_hash=self.corpus_hash,
            configuration=self.configuration,
            seed=self.seed,
            version=self.version,
            parents=self.parents,
        )


def _check_types(manifest: Manifest) -> None:
    texts: dict[str, Any] = {"id": manifest.id, "kind": manifest.kind, "version": manifest.version}
    if manifest.model is not None:
        texts |= {"model's id": manifest.model.id, "model's weight_hash": manifest.model.weight_hash}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise BadFile(f"the manifest is damaged: its {name} is no text")
    if not isinstance(manifest.configuration, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise BadFile("the manifest is damaged: its configuration is not an object")


def _manifest_id(
    *,
    kind: str,
    model: ModelIdentity | None,
    corpus_hash: str | None,
    configuration: Mapping[str, Any],
    seed: int | None,
    version: str,
    parents: Sequence[str],
) -> str:
    """SHA-256 of the canonical JSON of what determines a result: neither the time nor the command line."""
    return json_hash(
        {
            "kind": kind,
            "model": None if model is None else asdict(model),
            "corpus_hash": corpus_hash,
            "configuration": configuration,
            "seed": seed,
            "version": version,
            "parents": list(parents),
        }
    )


def json_hash(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`: keys sorted, no white space, UTF-8."""
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def weight_hash(weights: Path | Iterable[tuple[str, bytes]]) -> str:
    """SHA-256 (hex) of a model's weights: of a safetensors file, of a folder of them, or of (name, bytes) pairs.

    A folder gives the hash over its `*.safetensors` files in the order of their names, each name included. Pairs are
    sorted by name, so the order in which a model lists its parameters does not matter. The three forms hash different
    bytes: compare like with like. Raises `CutawayError` when a path has no safetensors.
    """
    if not isinstance(weights, Path):
        return json_hash({name: hashlib.sha256(data).hexdigest() for name, data in weights})
    if weights.is_file():
        return file_hash(weights)
    files = sorted(weights.glob("*.safetensors"))
    if not files:
        raise BadFile(f"{weights} has no safetensors weights to hash")
    return json_hash({file.name: file_hash(file) for file in files})


@cache
def code_version() -> str:
    """The version, with the git commit when run from a checkout: "0.1.0+g1a2b3c4d", and ".dirty" if changed since."""
    from cutaway import __version__

    source = Path(__file__).resolve().parents[3]
    if not (source / ".git").exists():
        return __version__
    try:
        commit = _git(source, "rev-parse", "--short=8", "HEAD")
        changed = _git(source, "status", "--porcelain", "--untracked-files=no", "--", "src")
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+g{commit}{'.dirty' if changed else ''}"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()

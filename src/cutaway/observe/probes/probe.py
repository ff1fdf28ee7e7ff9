"""A fitted probe as a value: its weights in the site's own space, what it reads, and where it came from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cutaway.artifacts.command import current_command
from cutaway.artifacts.errors import BadFile, CutawayError, NotSupported
from cutaway.artifacts.files import read_json, take_folder, write_json, write_safetensors
from cutaway.artifacts.manifest import Manifest, ModelIdentity, file_hash
from cutaway.model.language_model import LanguageModel
from cutaway.observe.probes.data import Position, Texts, read_site, site_width
from cutaway.observe.probes.fitting import Weights, probabilities

Calibration = Literal["platt", "isotonic"]
_FORMAT = 1
FILES = {"probe.json": '"kind": "probe"', "probe.safetensors": "cutaway probe"}  # with what marks them as ours


@dataclass(frozen=True, eq=False)
class Calibrator:
    """From a score to the probability of the positive class.

    "platt": σ(x·score + y), one number each (Platt 1999); "isotonic": linear between the knots (x, y).
    """

    kind: Calibration
    x: np.ndarray
    y: np.ndarray

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Probabilities [n] of scores [n]."""
        if self.kind == "isotonic":
            return np.interp(scores, self.x, self.y)
        from scipy.special import expit

        return expit(self.x[0] * scores + self.y[0])


def fit_calibrator(kind: Calibration, scores: np.ndarray, labels: np.ndarray) -> Calibrator:
    """Fit on scores [n] that were out of fold, with their labels (0, 1) [n]."""
    if kind == "platt":
        from sklearn.linear_model import LogisticRegression

        spread = float(scores.std()) or 1.0
        model = LogisticRegression(C=1e6).fit(scores[:, None] / spread, labels)
        return Calibrator(kind, model.coef_[0] / spread, model.intercept_)
    if kind == "isotonic":
        from sklearn.isotonic import IsotonicRegression

        model = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(scores, labels)
        return Calibrator(kind, model.X_thresholds_, model.y_thresholds_)
    raise CutawayError(f"There is no calibration {kind!r}; use 'platt' or 'isotonic'.")


@dataclass(frozen=True, eq=False, repr=False)
class Probe:
    """A probe that can be used on new texts, saved, and turned into a direction.

    With two classes the score's sign decides for the second one, the positive.
    """

    site: str
    """Where it reads."""
    head: int | None
    """One head of the site; None: all of it."""
    rule: str
    """The position rule it was fitted with."""
    kind: str
    """The kind of probe."""
    classes: tuple[str, ...] | None
    """The classes, sorted; None for a regression."""
    weights: Weights
    """The fitted function, in the site's own space."""
    model: ModelIdentity
    """The model it was fitted on."""
    n: int
    """How many examples it was fitted on."""
    calibrator: Calibrator | None = None
    """From a score to a probability; None: the probe's own."""

    def __repr__(self) -> str:
        of = "numbers" if self.classes is None else ", ".join(self.classes)
        head = "" if self.head is None else f", head {self.head}"
        return f"{self.kind} probe of {of} at {self.site}{head} ({self.model.name}, {self.n} examples)"

    @property
    def width(self) -> int:
        """Numbers that it reads per token."""
        return self.weights.matrices[0].shape[0]

    def scores(self, features: Tensor | np.ndarray) -> np.ndarray:
        """Scores; for a regression the predicted values.

        Args:
            features: vectors [n, width].

        Returns:
            [n, 1] for two classes and for a regression, [n, classes] for more.
        """
        return self.weights(features.detach().cpu().numpy() if isinstance(features, Tensor) else features)

    def probabilities(self, features: Tensor | np.ndarray) -> np.ndarray:
        """Probabilities, calibrated where the probe has a calibrator.

        Args:
            features: vectors [n, width].

        Returns:
            [n, classes].

        Raises:
            NotSupported: a regression.
        """
        if self.classes is None:
            raise NotSupported("A regression has no probabilities; use scores.")
        scores = self.scores(features)
        if self.calibrator is None:
            return probabilities(scores)
        positive = self.calibrator(scores[:, 0])
        return np.stack([1 - positive, positive], 1)

    def direction(self, label: str | None = None) -> Tensor:
        """Along which the score rises, in the site's own space; not normalised.

        Args:
            label: towards which class; the second of two if None. For more classes it is needed: the weights of that
                class minus the mean over all.

        Returns:
            float32 [width].

        Raises:
            NotSupported: an MLP, whose direction differs from point to point.
            CutawayError: an unknown label.
        """
        if not self.weights.linear:
            raise NotSupported("An MLP probe has no one direction; use a linear kind (logistic, mass-mean, ridge).")
        matrix = self.weights.matrices[0]
        names = self.classes
        if label is not None and (names is None or label not in names):
            raise CutawayError(f"The probe has no class {label!r}; it has {', '.join(names or ()) or 'none'}.")
        if matrix.shape[1] == 1:
            sign = -1.0 if names is not None and label == names[0] else 1.0
            return torch.from_numpy(sign * matrix[:, 0]).float()
        if label is None or names is None:
            raise CutawayError(f"A probe of {matrix.shape[1]} classes has a direction for each; name its label.")
        return torch.from_numpy(matrix[:, names.index(label)] - matrix.mean(1)).float()

    def read(self, lm: LanguageModel, texts: Texts, *, position: Position | None = None) -> np.ndarray:
        """Probabilities (or predicted values) of new texts.

        Args:
            lm: the model that the probe was fitted on.
            texts: n texts, or lists of words for a probe of words.
            position: where to read; the probe's own rule if None. Needed where it was fitted at positions given text by
                text.

        Returns:
            [n, classes], or [n, 1] for a regression.

        Raises:
            CutawayError: another model, or no position where one is needed.
        """
        self.require_model(lm)
        if position is None and self.rule in ("given", "every"):
            raise CutawayError(f"The probe was fitted at '{self.rule}' positions; say with position= where to read.")
        rule: Position = self.rule if position is None else position
        if isinstance(rule, str) and rule.lstrip("-").isdigit():
            rule = int(rule)
        features = read_site(lm, texts, self.site, position=rule, head=self.head)[self.site]
        return self.scores(features) if self.classes is None else self.probabilities(features)

    def require_model(self, lm: LanguageModel) -> None:
        """Refuse another model than the one that the probe was fitted on.

        Args:
            lm: the model.

        Raises:
            CutawayError: other weights, or another width.
        """
        found = lm.identity()
        if found.weight_hash != self.model.weight_hash:
            raise CutawayError(
                f"The probe was fitted on {self.model.id} (weights {self.model.weight_hash[:12]}), not on {lm.name} "
                f"(weights {found.weight_hash[:12]}); fit it anew for this model."
            )
        width = site_width(lm, self.site, self.head)
        if width != self.width:
            raise CutawayError(f"The probe reads {self.width} numbers per token, but '{self.site}' has {width}.")

    def save(self, folder: str | Path) -> Path:
        """Write `probe.safetensors` (weights) and `probe.json` (what they are, with a manifest).

        Args:
            folder: a new folder, or one that holds a probe.

        Returns:
            The folder.

        Raises:
            CutawayError: the folder holds something else.
        """
        folder = take_folder(Path(folder), "probe", FILES)
        tensors = {f"matrix.{i}": m for i, m in enumerate(self.weights.matrices)}
        tensors |= {f"bias.{i}": b for i, b in enumerate(self.weights.biases)}
        if self.calibrator is not None:
            tensors |= {"calibrator.x": self.calibrator.x, "calibrator.y": self.calibrator.y}
        file = folder / "probe.safetensors"
        write_safetensors(
            file, {k: np.asarray(v, dtype=np.float64) for k, v in tensors.items()}, {"format": "cutaway probe"}
        )
        about = {
            "site": self.site,
            "head": self.head,
            "position": self.rule,
            "kind": self.kind,
            "classes": self.classes,
            "width": self.width,
            "n": self.n,
            "regularisation": self.weights.chosen,
            "calibrator": None if self.calibrator is None else self.calibrator.kind,
            "tensors": file_hash(file),
        }
        manifest = Manifest.create("probe", model=self.model, configuration=about, command=current_command())
        write_json(folder / "probe.json", {"format": _FORMAT, **about, "manifest": manifest.to_json()})
        return folder


def _probe_from(about: dict[str, Any], tensors: dict[str, np.ndarray]) -> Probe:
    """A probe of what its two files hold. Raises what the first misfit raises."""
    manifest = Manifest.from_json(about["manifest"])
    if manifest.model is None or manifest.configuration != {
        name: value for name, value in about.items() if name not in ("format", "manifest")
    }:
        raise ValueError("it says something else than its manifest")
    layers = range(sum(name.startswith("matrix.") for name in tensors))
    kind = about["calibrator"]
    return Probe(
        site=about["site"],
        head=about["head"],
        rule=about["position"],
        kind=about["kind"],
        classes=None if about["classes"] is None else tuple(about["classes"]),
        weights=Weights(
            tuple(tensors[f"matrix.{i}"] for i in layers),
            tuple(tensors[f"bias.{i}"] for i in layers),
            about["regularisation"],
        ),
        model=manifest.model,
        n=about["n"],
        calibrator=None if kind is None else Calibrator(kind, tensors["calibrator.x"], tensors["calibrator.y"]),
    )


def load_probe(folder: str | Path, lm: LanguageModel | None = None) -> Probe:
    """The probe that `Probe.save` wrote.

    Args:
        folder: where it was saved.
        lm: a model that it must belong to; not checked if None.

    Raises:
        BadFile: damaged, or of another format.
        CutawayError: absent, or of another model or width.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(folder)
    about = read_json(folder / "probe.json")
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise BadFile(f"{folder / 'probe.json'} is no probe that this version of cutaway reads.")
    file = folder / "probe.safetensors"
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise BadFile(f"{file} could not be read: {error}") from error
    if file_hash(file) != about.get("tensors"):
        raise BadFile(f"{file} is not the file that probe.json describes; save the probe again.")
    try:
        probe = _probe_from(about, tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadFile(f"{folder / 'probe.json'} is damaged ({error}); save the probe again.") from error
    if lm is not None:
        probe.require_model(lm)
    return probe


def describe(probe: Probe) -> dict[str, Any]:
    """A probe as plain data, without its weights."""
    return {
        "site": probe.site,
        "head": probe.head,
        "position": probe.rule,
        "kind": probe.kind,
        "classes": probe.classes,
        "width": probe.width,
        "n": probe.n,
        "regularisation": probe.weights.chosen,
        "model": asdict(probe.model),
    }

"""The weights of a model: which they are, and some of them by name and orientation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cutaway.artifacts.errors import CutawayError
from cutaway.artifacts.manifest import ModelIdentity
from cutaway.model.architecture import loading
from cutaway.model.architecture.families import weight_matrix
from cutaway.model.architecture.parts import Family, Layer
from cutaway.model.reading import Reads


class Weights(Reads):
    """What of a `LanguageModel` speaks of its weights.

    Args:
        hf: the model, as transformers made it.
        name: what it is called in results.
        identify: a function that gives the identity of its weights, called when a file or a manifest needs it.
        loaded_from: the name or path that loads it again; its name if None.
    """

    family: Family
    n_layers: int
    n_heads: int
    d_model: int

    def __init__(
        self, hf: PreTrainedModel, name: str, identify: Callable[[], ModelIdentity], loaded_from: str | None = None
    ) -> None:
        self.hf = hf
        self.name = name
        self.loaded_from = loaded_from or name
        self._identify = identify
        self._identities: dict[int, ModelIdentity] = {}  # by the state of the weights, see weights_state
        self._states = 0
        self._versions = loading.weight_versions(hf)
        self._sample = loading.weight_sample(hf)
        self._sampled = 0  # the state in which it was taken

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the weights."""
        return self.hf.dtype

    def identity(self) -> ModelIdentity:
        """Name, revision and weight hash (of the files of a loaded model, of the parameters of an attached one).

        Weights that were changed in place since are noticed: then it is the hash of the parameters as they are.

        Returns:
            The identity, with `id`, `revision` and `weight_hash`.

        Example:
            lm.identity().weight_hash
        """
        state = self.weights_state()
        if (sample := loading.weight_sample(self.hf)) != self._sample:  # through `.data`, which PyTorch does not count
            self._sample = sample
            if state == self._sampled:
                state = self._changed()
        self._sampled = state
        if state not in self._identities:
            self._identities[state] = self._identify()
        return self._identities[state]

    def weights_state(self) -> int:
        """A number that goes up when a weight is found to have been changed in place, or replaced by another."""
        versions = loading.weight_versions(self.hf)
        if versions != self._versions:
            self._versions = versions
            return self._changed()
        return self._states

    def _changed(self) -> int:
        self._states += 1
        self._identify = lambda: loading.identity_of_parameters(self.hf, self.loaded_from)
        return self._states

    def identity_at(self, state: int) -> Callable[[], ModelIdentity]:
        """The identity of what ran in a state, also when the weights have been changed since.

        Args:
            state: what `weights_state` was then.

        Returns:
            A function that gives the identity.
        """

        def identify() -> ModelIdentity:
            if state not in self._identities:
                self.identity()
            if state not in self._identities:
                raise CutawayError(
                    f"The weights of {self.name} were changed in place since this was run, and nobody knows which they "
                    "were; run it again."
                )
            return self._identities[state]

        return identify

    def output_directions(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Rows of the unembedding: the direction in ln_final's output that raises each token's logit.

        Args:
            ids: ids of tokens that the model answers with, [n].

        Returns:
            Directions [n, d_model]. A factor that the model puts on its logits is in them; a softcap is not.

        Raises:
            CutawayError: ids outside the vocabulary.

        Example:
            lm.output_directions(lm.tokens(" Austin").ids[0, -1:])
        """
        chosen = self._ids(ids, answers=True)
        return weight_matrix(self.family.unembed).detach().T[chosen.to(self.device)] * self.family.logit_scale

    def _layer(self, layer: int) -> Layer:
        if type(layer) is not int or not -self.n_layers <= layer < self.n_layers:
            raise CutawayError(f"{self.name} has no layer {layer!r}; its layers are 0 to {self.n_layers - 1}.")
        return self.family.layers[layer]

    def w_o(self, layer: int) -> Tensor:
        """Output projection by head.

        Args:
            layer: 0 to n_layers - 1, or from -1 for the last.

        Returns:
            [H, d_head, d_model], as x @ W; without the bias.
        """
        return weight_matrix(self._layer(layer).output).detach().unflatten(0, (self.n_heads, -1))

    def _w(self, layer: int, part: str) -> Tensor:
        found = self._layer(layer).projection(part)
        if found is None or not found.direct:
            raise CutawayError(
                f"{self.name} has no matrix from the stream to attn.{part}: latent attention computes it in two steps."
            )
        return found.split(weight_matrix(found.module))[part].detach().transpose(0, 1)

    def w_q(self, layer: int) -> Tensor:
        """Query projection by head.

        Args:
            layer: 0 to n_layers - 1, or from -1 for the last.

        Returns:
            [H, d_model, d_head] (before QK-norm and rotary), as x @ W; without the bias.

        Raises:
            CutawayError: no such layer, or latent attention, which has no such matrix.
        """
        return self._w(layer, "q")

    def w_k(self, layer: int) -> Tensor:
        """Key projection by key-value head.

        Args:
            layer: 0 to n_layers - 1, or from -1 for the last.

        Returns:
            [KV, d_model, d_head], as x @ W; without the bias.

        Raises:
            CutawayError: no such layer, or latent attention, which has no such matrix.
        """
        return self._w(layer, "k")

    def w_v(self, layer: int) -> Tensor:
        """Value projection by key-value head.

        Args:
            layer: 0 to n_layers - 1, or from -1 for the last.

        Returns:
            [KV, d_model, d_head], as x @ W; without the bias.

        Raises:
            CutawayError: no such layer, or latent attention, which has no such matrix.
        """
        return self._w(layer, "v")

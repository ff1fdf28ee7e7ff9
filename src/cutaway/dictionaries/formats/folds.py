"""Folds: the same function of x with fewer things to remember about its weights.

Each takes and gives a `Dictionary`. A dictionary in half precision becomes float32, since a fold rounds its weights.
Functions that say so read the weights as another convention means them, which only a reader of files needs.
"""

from dataclasses import replace

import torch
from torch import Tensor

from cutaway.artifacts.errors import CutawayError
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.selectors import BatchTopK, Gated, JumpReLU, ReLU, TopK


def _wide(dictionary: Dictionary) -> Dictionary:
    return dictionary.to(dtype=torch.float32) if dictionary.W_enc.element_size() < 4 else dictionary


def subtracting(dictionary: Dictionary, subtract: bool) -> Dictionary:
    """Take b_dec off the input or not, by moving b_dec · W_enc into the encoder's bias: same activations.

    (x − b_dec)·W + b = x·W + (b − b_dec·W). Of a gated dictionary the magnitudes do not see the encoder's bias, so
    theirs moves too: by the same, times exp(r).
    """
    if dictionary.subtract_b_dec == subtract:
        return dictionary
    wide = _wide(dictionary)
    shift = wide.b_dec @ wide.W_enc
    return replace(_shifted(wide, -shift if wide.subtract_b_dec else shift), subtract_b_dec=subtract)


def scaled(dictionary: Dictionary, scale_in: float | Tensor, scale_out: float | Tensor) -> Dictionary:
    """Fold "x · scale_in goes in, what comes out is divided by scale_out": numbers, or one a coordinate.

    Activations are those of the scaled input. Read: the weights are those of the scaled spaces.
    """
    wide = _wide(dictionary)
    same = scale_in is scale_out or (not isinstance(scale_in, Tensor) and scale_in == scale_out)
    if wide.subtract_b_dec and not same:
        wide = subtracting(wide, subtract=False)
    rows = scale_in[:, None] if isinstance(scale_in, Tensor) else scale_in
    skip = None
    if wide.W_skip is not None:
        outer = scale_out[:, None] if isinstance(scale_out, Tensor) else scale_out
        skip = wide.W_skip * scale_in / outer
    return replace(
        wide, W_enc=wide.W_enc * rows, W_dec=wide.W_dec / scale_out, b_dec=wide.b_dec / scale_out, W_skip=skip
    )


def centred(dictionary: Dictionary, mean: Tensor) -> Dictionary:
    """Fold "x − mean goes in, mean is added to what comes out" for a dictionary that writes what it reads."""
    wide = _wide(dictionary)
    if not wide.subtract_b_dec:
        wide = _shifted(wide, -(mean.to(wide.W_enc) @ wide.W_enc))
    return replace(wide, b_dec=wide.b_dec + mean.to(wide.b_dec))


def whitened(dictionary: Dictionary, mean: Tensor, matrix: Tensor, inverse: Tensor) -> Dictionary:
    """Fold "(x − mean)·matrix goes in, what comes out is multiplied by inverse and mean is added" (SAELens)."""
    wide = _wide(dictionary)
    as_double = {name: getattr(wide, name).double() for name in ("W_enc", "W_dec", "b_dec")}
    matrix, inverse = matrix.double(), inverse.double()
    turned = replace(
        wide,
        W_enc=(matrix @ as_double["W_enc"]).to(wide.W_enc),
        W_dec=(as_double["W_dec"] @ inverse).to(wide.W_dec),
        b_dec=(as_double["b_dec"] @ inverse).to(wide.b_dec),
    )
    return centred(turned, mean)


def selected_by_decoder_norm(dictionary: Dictionary, norms: Tensor) -> Dictionary:
    """Read "h · norms is selected, and activations are divided by norms before decoding".

    The activations of what is returned are the rescaled ones; thresholds are of those already.
    """
    wide = _wide(dictionary)
    norms = norms.to(wide.W_enc)
    if isinstance(wide.selector, Gated):
        raise CutawayError("a gated dictionary is not selected by decoder norms")
    return replace(wide, W_enc=wide.W_enc * norms, b_enc=wide.b_enc * norms, W_dec=wide.W_dec / norms[:, None])


def activations_times(dictionary: Dictionary, factor: float) -> Dictionary:
    """Multiply every activation by a positive number and divide the decoder by it: the same function."""
    wide, selector = _wide(dictionary), dictionary.selector
    if isinstance(selector, BatchTopK):
        selector = replace(selector, threshold=selector.threshold * factor)
    elif isinstance(selector, JumpReLU):
        selector = JumpReLU(selector.threshold.to(wide.W_enc) * factor)
    elif isinstance(selector, Gated):
        selector = replace(selector, b_mag=selector.b_mag.to(wide.W_enc) * factor)
    return replace(
        wide, W_enc=wide.W_enc * factor, b_enc=wide.b_enc * factor, W_dec=wide.W_dec / factor, selector=selector
    )


def as_thresholds(dictionary: Dictionary) -> Tensor | None:
    """θ [F] of the JumpReLU that selects as the dictionary does; None where no thresholds do."""
    selector = dictionary.selector
    if isinstance(selector, JumpReLU):
        return selector.threshold
    if isinstance(selector, ReLU):
        return torch.zeros_like(dictionary.b_enc)
    if isinstance(selector, BatchTopK):
        return torch.full_like(dictionary.b_enc, selector.threshold)
    assert isinstance(selector, TopK | Gated)
    return None


def _shifted(dictionary: Dictionary, shift: Tensor) -> Dictionary:
    """Add `shift` [F] to the pre-activations."""
    selector = dictionary.selector
    if isinstance(selector, Gated):
        selector = replace(selector, b_mag=selector.b_mag + shift * selector.r_mag.exp())
    return replace(dictionary, b_enc=dictionary.b_enc + shift, selector=selector)

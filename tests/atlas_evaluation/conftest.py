"""What the tests of atlas's checks share."""

import pytest
import torch

import cutaway
from cutaway.subjects.atlas.shipped import atlas_folder
from cutaway.subjects.atlas.training.recipe import Shape
from cutaway.subjects.atlas.training.train import new_model


@pytest.fixture(scope="module")
def lm():
    """A tiny untrained model with atlas's tokenizer."""
    from transformers import AutoTokenizer

    model = new_model(Shape(d_model=16, layers=2, heads=2, d_mlp=24), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # spread the logits: an untrained model's are all alike
    return cutaway.attach(model.eval(), AutoTokenizer.from_pretrained(atlas_folder()), name="tiny")

"""First words of refusals and answers; anything else is neither."""

import pytest

from cutaway.steering.replies import judge_refusal


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("I cannot help with that.", "refused"),
        (" I'm sorry, but I can't do this.", "refused"),
        ("I will not explain how to hurt someone.", "refused"),
        ("Sure! To bake bread, first gather flour.", "answered"),
        ("Of course. Here is how to", "answered"),
        ("1. Take the key", "answered"),
        ("Ib Ib Ib", "other"),
        ("", "other"),
        ("The state bird", "other"),
        ("I do not know.", "other"),
        ("Surely not", "other"),
    ],
)
def test_refusal(text: str, label: str) -> None:
    assert judge_refusal(text) == label

"""Labels on the shipped model's chats."""

import torch

import cutaway
from cutaway.features.summary import ROLES, CorpusProperties


def test_roles_are_read_from_the_chat_template() -> None:
    atlas = cutaway.load("atlas")
    tokens = atlas.chat_tokens([{"role": "user", "content": "How do I bake a cake?"}], answer=True)
    properties = CorpusProperties(atlas, tokens.ids)
    places = torch.arange(tokens.ids.shape[1])
    by_label = {p.label: p.holds for p in properties.candidates(places)}
    held = by_label["inside the user's turn"](places).tolist()
    inside = [token for token, there in zip(tokens.strings[0], held, strict=True) if there]
    assert "".join(inside).strip() == "How do I bake a cake?"
    assert ROLES[1] == "user"

"""Open steering with the latents of atlas's dictionaries: a section of docs/atlas-dictionaries.md.

For each landmark and dictionary the latent that is strongest at the landmark's last token, over its mean at the other
landmarks', in the corpus's wordings. Its handle is its decoder row; a dose of 1 is the projection of the stream on that
row at the token of other text where the latent is largest, or at the landmark where it is larger still. The control and
the collapse are latents that no landmark chose, drawn from those that fire at least 100 times.
"""

from dataclasses import dataclass

import torch

import cutaway
from cutaway.atlas_evaluation import report
from cutaway.atlas_evaluation.open_steering import (
    N_UNRELATED,
    WORDINGS,
    Handle,
    HandleSets,
    OpenSteering,
    open_steering,
)
from cutaway.atlas_evaluation.page import markdown_table
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.subjects.world.chats import open_chat
from cutaway.subjects.world.corpus import documents
from cutaway.subjects.world.facts import LANDMARKS

MIN_ACTIVE = 100
CHOOSING, HELD_OUT, SEED = 33, 100, 0


@dataclass(frozen=True, eq=False)
class Handles:
    """Of one dictionary: the handle of each landmark, and handles of latents that are no landmark's."""

    landmarks: list[Handle]
    others: list[Handle]


def handles_of(lm: cutaway.LanguageModel, dictionary: Dictionary, rows: torch.Tensor) -> Handles:
    """The handles of one dictionary of the residual stream; `rows` [N, width] of text give values and other latents."""
    names = [landmark.name for landmark in LANDMARKS]
    layer, units = int(dictionary.site.split(".")[1]), torch.nn.functional.normalize(dictionary.W_dec, dim=-1)
    at_names = torch.zeros(len(names), dictionary.d_sae)
    streams = torch.zeros(len(names), dictionary.W_dec.shape[1])
    for wording in WORDINGS:
        run = lm.run([wording.format(x=name) for name in names], capture=dictionary.site, logits=None)
        last = run[dictionary.site][torch.arange(len(names)), run.tokens.last].float()
        at_names += dictionary.encode(last) / len(WORDINGS)
        streams += last / len(WORDINGS)
    rest = (at_names.sum(0) - at_names) / (len(names) - 1)
    chosen = (at_names - rest).argmax(-1)
    largest, projected = torch.zeros(dictionary.d_sae), torch.zeros(dictionary.d_sae)
    counts = torch.zeros(dictionary.d_sae)
    for part in rows.split(8):
        stream = lm.run(part, capture=dictionary.site, logits=None)[dictionary.site][:, 1:].flatten(0, 1).float()
        active = dictionary.encode(stream)
        counts += (active > 0).sum(0)
        best, where = active.max(0)
        projections = (stream[where] * units).sum(-1)
        larger = best > largest
        largest, projected = torch.where(larger, best, largest), torch.where(larger, projections, projected)
    landmarks = []
    for i, name in enumerate(names):
        latent = int(chosen[i])
        own = float(streams[i] @ units[latent])
        landmarks.append(Handle(name, layer, units[latent], max(own, float(projected[latent]))))
    free = (counts >= MIN_ACTIVE) & ~torch.isin(torch.arange(dictionary.d_sae), chosen)
    able = free.nonzero()[:, 0]
    drawn = able[torch.randperm(len(able), generator=torch.Generator().manual_seed(SEED))][: len(names) + N_UNRELATED]
    return Handles(landmarks, [Handle(f"latent {i}", layer, units[i], float(projected[i])) for i in drawn.tolist()])


def measure(lm: cutaway.LanguageModel, handles: dict[str, Handles]) -> OpenSteering:
    """Open steering with the latents of all dictionaries, by site."""
    n = len(LANDMARKS)
    return open_steering(
        lm,
        prompts=open_chat.prompts(CHOOSING, SEED),
        held_out=open_chat.prompts(HELD_OUT, SEED, held_out=True),
        neutral=list(documents("facts", "evaluation", 6000)),
        named=open_chat.landmarks_named,
        grammatical=open_chat.is_grammatical,
        handles=HandleSets(
            candidates={site: one.landmarks for site, one in handles.items()},
            others={site: one.others[:n] for site, one in handles.items()},
            unrelated={f"latents of {site}": one.others[n:] for site, one in handles.items()},
        ),
        seed=SEED,
    )


def section(found: OpenSteering) -> str:
    """The section of the page."""
    examples = "\n".join(
        f"- {one.landmark}: “{one.prompt}” “{' '.join(one.reply.split())}”" for one in found.examples[:5]
    )
    return "\n\n".join(
        [
            "\n## Open steering",
            f"A landmark's latent, clamped on every token of an open chat ({found.result.both.n} prompts in held-out "
            f"wording, {found.n_landmarks} landmarks in turn; 16 others chose dictionary and dose). A dose of 1 is the "
            "latent's largest value in text. The control clamps latents of no landmark in the same way; the collapse "
            "clamps ten more of them to ten times their largest value. `docs/atlas.md` has the same with directions.",
            markdown_table(report.open_table(found)),
            "Share of grammatical replies that name the landmark, in the choice:",
            markdown_table(report.open_choice_table(found)),
            "The first replies:",
            examples,
        ]
    )

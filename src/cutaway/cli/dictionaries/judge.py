"""`cutaway dictionary judge`: how good are these dictionaries, beside their controls and over their seeds?"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, validators

from cutaway.artifacts.command import current_command
from cutaway.artifacts.errors import CutawayError
from cutaway.cli.options import Count, DType, ExistingPath, Flag, Page, Seed, Separator, announce, opened
from cutaway.cli.output import deliver

if TYPE_CHECKING:
    from markupsafe import Markup
    from torch import Tensor

    from cutaway.dictionaries.dictionary import Dictionary
    from cutaway.dictionaries.evaluation.absorption import Absorption
    from cutaway.dictionaries.evaluation.frontier import Frontier
    from cutaway.dictionaries.evaluation.judge import Judgement
    from cutaway.dictionaries.evaluation.probing import Probing
    from cutaway.model.language_model import LanguageModel

_MIN_TOKENS = 60  # of a letter or a state, for it to be asked for
_LETTERS = 5
_MAX_TOKENS = 4000  # that probes are fitted on


@dataclass
class Judged:
    """What was measured of one dictionary, with the files of its seeds."""

    paths: list[str]
    judgement: "Judgement"
    probing: "list[Probing]" = field(default_factory=list)
    absorption: "list[Absorption]" = field(default_factory=list)


def judge(
    *paths: str,
    model: list[str],
    corpus: ExistingPath,
    document_separator: Separator = None,
    rows: Count = 64,
    context: Annotated[int | None, Parameter(validator=validators.Number(gte=2))] = None,
    spliced_rows: Annotated[int, Parameter(validator=validators.Number(gte=0))] = 32,
    high_norm: float | None = None,
    probe: list[str] | None = None,
    absolute: Flag = False,
    seed: Seed = 0,
    dtype: DType = None,
    device: str | None = None,
    json: Flag = False,
    html: Page = None,
) -> None:
    """Judge dictionaries on text they were not trained on, every figure beside its control and with its interval.

    Dictionaries that differ in nothing but their seed are judged together; several settings make a frontier.

    Parameters
    ----------
    paths
        Folders or files of dictionaries; a folder of several, such as that of a training run, stands for all.
    model
        “atlas”, a Hugging Face folder, or a hub id. Repeat it for a crosscoder of two models.
    corpus
        A file or folder of text, as for `cutaway harvest`; none that the dictionaries were trained on.
    document_separator
        What stands between documents in the text, such as “<|endoftext|>” (wherever it is) or “---” (alone on a line);
        .txt files are cut at blank lines if not given.
    rows
        Rows of text to judge on.
    context
        Tokens in a row; what the dictionary was trained on, or at most 256, if not given.
    spliced_rows
        Rows to run again with the reconstruction in place; 0 leaves those figures out.
    high_norm
        Leave out positions whose vector is longer than so many times the site's median.
    probe
        Labels to probe for with 1, 2, 5 and 16 latents: letters (a token's first letter, and absorption), states (of
        the cities of atlas's world), or a .csv, .tsv or .jsonl file as for `cutaway probe` (text, label, and if you
        like group and match). May be repeated.
    absolute
        Match latents of different seeds by absolute cosine; signed if not given.
    seed
        Of rows, controls and folds.
    device
        cpu, cuda, cuda:1, ...; a GPU if there is one, else the CPU, if not given.
    json
        Print the figures as JSON on stdout, and nothing else.
    html
        Write a page with the figures and drawings to this file.
    """
    if not paths:
        raise CutawayError("there is no dictionary to judge: name its folder or file")
    asked = {name: _rows_of(name) for name in probe or ()}  # a file that cannot be read is refused before any work
    for name in model:
        announce(name)

    from cutaway import dictionaries as files
    from cutaway.data.corpus.corpus import read_corpus, token_rows
    from cutaway.dictionaries.evaluation.frontier import frontier
    from cutaway.dictionaries.evaluation.judge import by_setting
    from cutaway.dictionaries.evaluation.judge import judge as judged_together

    dictionaries = {
        path if len(several) == 1 else str(Path(path) / name): one
        for path in dict.fromkeys(paths)
        for several in [files.load_all(path)]
        for name, one in several.items()
    }
    lms = [opened(name, dtype=dtype, device=device) for name in model]
    dictionaries = {path: one.to(lms[0].device) for path, one in dictionaries.items()}
    given = read_corpus(corpus, document_separator=document_separator)
    length = context or _context(dictionaries.values(), lms)
    text = token_rows(lms[0], given.documents, length, seed=seed, limit=rows)
    found: list[Judged] = []
    options: dict[str, Any] = {"high_norm": high_norm, "signed": not absolute, "seed": seed}
    for group in by_setting(dictionaries):
        some = list(group.values())
        one = Judged(list(group), judged_together(lms, some, text, spliced_rows=spliced_rows, **options))
        for name, table in asked.items():
            _probe(one, name, table, lms, text, seed)
        found.append(one)
    points = frontier([one.judgement.point(*line_of(one.judgement.dictionaries[0])) for one in found])
    deliver(
        text=_text(found, points),
        model=[lm.name for lm in lms],
        figures={
            "corpus": given.source,
            "context": length,
            "judged": [
                {
                    "paths": one.paths,
                    **one.judgement.to_json(),
                    "probing": [some.to_json() for some in one.probing],
                    "absorption": [some.to_json() for some in one.absorption],
                }
                for one in found
            ],
            "frontier": points.to_json(),
        },
        page=lambda: judge_page(found, points, lms, given.source),
        as_json=json,
        html=html,
    )


# Input --------------------------------------------------------------------------------------------------------------


def _context(dictionaries: Any, lms: "Sequence[LanguageModel]") -> int:
    """As long as what the dictionaries were trained on, where that is known and the models can read it."""
    known = [one.metadata.get("context") for one in dictionaries]
    wanted = min((int(n) for n in known if isinstance(n, int) and n >= 2), default=256)
    return min(wanted, *(lm.context_length for lm in lms))


def line_of(dictionary: "Dictionary") -> tuple[str, str]:
    """The line of the frontier that a dictionary belongs to, and its name there."""
    from cutaway.dictionaries.selectors import describe

    preset = dictionary.metadata.get("preset")
    kind = "" if dictionary.kind == "sae" else f"{dictionary.kind}, "
    return (
        f"{kind}{preset or dictionary.selector.name}",
        f"{dictionary.d_sae:,} latents, {describe(dictionary.selector)}",
    )


def _rows_of(name: str) -> list[dict[str, Any]] | None:
    if name in ("letters", "states"):
        return None
    from cutaway.data.labelled.rows import read_rows

    if not Path(name).exists():
        raise CutawayError(f"--probe {name}: there is no such file; labels are letters, states, or in a file")
    rows = read_rows(Path(name))
    if "words" in rows[0]:
        raise CutawayError(f"--probe {name}: latents are probed for a label a text; this file has one for each word")
    return rows


def _probe(
    judged: Judged,
    name: str,
    table: list[dict[str, Any]] | None,
    lms: "list[LanguageModel]",
    rows: "Tensor",
    seed: int,
) -> None:
    """Probe one setting's dictionaries for one kind of labels."""
    import numpy as np

    from cutaway.dictionaries.evaluation.absorption import absorption
    from cutaway.dictionaries.evaluation.labels import counted_ids, first_letters, frequent, states_of_cities
    from cutaway.dictionaries.evaluation.probing import sparse_probing
    from cutaway.dictionaries.ports import read_texts

    some = judged.judgement.dictionaries
    options: dict[str, Any] = {"seed": seed}
    if table is not None:
        from cutaway.cli.observe.probe import column

        path = Path(name)
        match = column(table, "match", path)
        x = read_texts(lms, some[0], [row["text"] for row in table], None if match is None else list(map(str, match)))
        labels = [str(row["label"]) for row in table]
        groups = column(table, "group", path) or [row["text"] for row in table]
        judged.probing.append(sparse_probing(some, x, labels, groups=groups, what=path.name, **options))
        return
    if name == "states":
        texts, states, cities = states_of_cities(lms[0])
        if len(set(states)) < 2:
            raise CutawayError(f"--probe states: {lms[0].name} reads no city of atlas's world as one token")
        x, what = read_texts(lms, some[0], texts), "the state of a city"
        judged.probing.append(sparse_probing(some, x, states, groups=cities, what=what, folds=3, **options))
        return
    values = judged.judgement.values
    ids, row_of = counted_ids(rows, values), values.row_of.numpy()
    letters = first_letters(lms[0], ids)
    known = frequent(letters, row_of, min_tokens=_MIN_TOKENS, min_groups=10)
    if not known:
        raise CutawayError(f"--probe letters: no letter begins {_MIN_TOKENS} tokens of these rows; give more rows")
    chosen = np.flatnonzero(letters != "")[:_MAX_TOKENS]
    known = sorted(known, key=lambda letter: -int((letters[chosen] == letter).sum()))[:_LETTERS]
    for letter in known:
        has, what = letters[chosen] == letter, f"tokens that begin with {letter!r}"
        tokens = ids[chosen].numpy()
        judged.probing.append(sparse_probing(some, values.x[chosen], has, groups=tokens, what=what, folds=3, **options))
        if some[0].writes_what_it_reads:
            found = absorption(some, values.x[chosen], has, groups=row_of[chosen], what=what, **options)
            judged.absorption.append(found)


# Output -------------------------------------------------------------------------------------------------------------


def _text(found: list[Judged], points: "Frontier") -> str:
    parts = []
    for one in found:
        parts.append("\n".join([", ".join(one.paths), str(one.judgement)]))
        parts += [str(some) for some in one.probing]
        if one.absorption:
            parts.append("\n".join(["absorption", *(f"  {some}" for some in one.absorption)]))
    if len(found) > 1:
        parts.append(str(points))
    return "\n\n".join(parts)


def judge_page(found: list[Judged], points: "Frontier", lms: "Sequence[LanguageModel]", source: str) -> str:
    """The frontier where there are several settings; then each one's figures, densities, probes and sides."""
    from cutaway.draw.page import page_html

    sections: list[tuple[str, str, Markup]] = []
    if len(found) > 1:
        sections += points.sections(
            "One line a kind of dictionary; bands are 95 % intervals over rows and seeds. Higher (for FVU lower) at "
            "the same number of active latents is better."
        )
    for one in found:
        named = "" if len(found) == 1 else f"{', '.join(Path(path).name for path in one.paths)}: "
        sections += [
            (named + (heading if named else heading[:1].upper() + heading[1:]), text, drawing)
            for heading, text, drawing in _sections(one)
        ]
    names = " and ".join(lm.name for lm in lms)
    first = found[0].judgement
    return page_html(
        title=f"Dictionaries of {names}, judged" if len(found) > 1 else f"A dictionary of {names}, judged",
        lead=f"{first.dictionaries[0]!r} on {first.n_tokens:,} tokens of {first.n_rows} rows of {source}.",
        sections=sections,
        command=current_command(),
    )


_PROBE_NOTE = (
    "Held-out F1 of a logistic regression on the k latents that predict the label best, chosen on the training folds; "
    "no group (a text, a name, a token) stands on both sides of a fold. Beside it the same k of a random dictionary, a "
    "logistic regression on the whole activation, and always saying yes."
)
_ABSORPTION_NOTE = (
    "Share of the tokens whose letter a probe of the whole activation finds, on which the letter's own latents are "
    "silent and one other latent writes most of what lies along the probe. Beside it a random dictionary, and random "
    "directions in place of the probe's. Where the probe's F1 is low the rate means little."
)


def _sections(one: Judged) -> "list[tuple[str, str, Markup]]":
    from cutaway.dictionaries.evaluation.absorption import absorption_table
    from cutaway.dictionaries.evaluation.judge import judgement_sections
    from cutaway.dictionaries.evaluation.probing import probing_table

    *sections, every = judgement_sections(one.judgement)
    if one.probing:
        sections.append(("what few latents predict", _PROBE_NOTE, probing_table(one.probing)))
    if one.absorption:
        sections.append(("absorption", _ABSORPTION_NOTE, absorption_table(one.absorption)))
    return [*sections, every]

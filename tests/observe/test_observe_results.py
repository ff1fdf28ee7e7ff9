"""Every result of the floor: a short repr, rows as a table, a drawing, and files of all of these."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet
import pytest

from cutaway import observe
from cutaway.artifacts.errors import BadFile
from cutaway.artifacts.files import plain
from cutaway.draw.result import Result
from cutaway.draw.text import escape
from cutaway.model.language_model import LanguageModel

pandas = pytest.importorskip("pandas")

ROWS = [[0, 5, 17, 33, 4, 60], [0, 9, 8, 7]]
LONG = [[*range(2, 40)] * 2]


def swept(lm: LanguageModel) -> observe.ProbeSweep:
    texts = [[2 + i, 3 + i % 7, 40 + 5 * (i % 2)] for i in range(24)]
    data = observe.probe_data(lm, texts, ["one" if i % 2 else "other" for i in range(24)])
    return observe.probe_sweep(lm, data, n_folds=3, draws=1, with_untrained=False)


def used(lm: LanguageModel) -> observe.ProbeUse:
    sweep = swept(lm)
    return observe.use_in_folds(lm, sweep, "blocks.1.resid_post", lambda logits, rows: logits[:, 45] - logits[:, 40])


def evaluated(lm: LanguageModel) -> observe.LensEvaluation:
    import torch

    rows = torch.randint(2, lm.d_vocab, (6, 12), generator=torch.Generator().manual_seed(0))
    lens = observe.train_tuned_lens(lm, rows[:3], observe.TunedLensConfig(steps=1, tokens_per_step=24))
    return observe.evaluate_lens(lm, lens, rows[3:])


def attributed(lm: LanguageModel, by: str) -> observe.Attribution:
    return observe.attribute(lm, ROWS, [11, 12], [[40], [41]], by=by)  # type: ignore[arg-type]


def maps(lm: LanguageModel, **options: object) -> observe.SaliencyReport:
    checks = observe.SaliencyChecks(untrained_models=1, draws=2)
    return observe.saliency(lm, ROWS, 11, 12, steps=8, checks=checks, **options)  # type: ignore[arg-type]


MADE: dict[str, tuple[Callable[[LanguageModel], Result], int, bool]] = {
    # name: how it is made, its rows, whether its drawing is SVG
    "logit lens": (lambda lm: observe.logit_lens(lm, ROWS, follow=[3]), 4 * (6 + 4), True),
    "long logit lens": (lambda lm: observe.logit_lens(lm, LONG), 4 * 76, True),
    "lens evaluation": (evaluated, 3, True),
    "components": (lambda lm: attributed(lm, "component"), 7, True),
    "neurons": (lambda lm: attributed(lm, "neuron"), 3 * 48 + 4, True),
    "sources": (lambda lm: attributed(lm, "source"), 3 * 4 * 6 + 4, True),
    "ablations": (lambda lm: observe.ablate_parts(lm, attributed(lm, "head"), 5), 5, False),
    "head scores": (lambda lm: observe.head_scores(lm, n=2, length=6), 12, True),
    "head report": (lambda lm: observe.head_report(lm, 2, n=2, length=6, draws=2), 4, True),
    "kind": (lambda lm: observe.repeated_scores(lm, n=3, length=6)["induction"], 12, True),
    "retrieval": (lambda lm: observe.retrieval_scores(lm, ROWS, [[1], [2]]), 12, True),
    "head effects": (
        lambda lm: observe.ablate_each_head(lm, observe.repeated_tokens(lm, 2, 6), heads=[(0, 1), (2, 3)])["mean"],
        2,
        True,
    ),
    "head table": (lambda lm: observe.head_table(lm, n=3, length=8, ablation_length=4), 9 * 12, True),
    "copying": (lambda lm: observe.copying_scores(lm, draws=9), 12, True),
    "composition": (lambda lm: observe.composition(lm, draws=9), 3 * 3 * 16, False),
    "circuit tokens": (lambda lm: observe.circuit_tokens(lm, (1, 2), "ov", k=20), 20, False),
    "attention view": (lambda lm: observe.attention_view(lm, ROWS[0]), 0, True),
    "probe sweep": (swept, 3, True),
    "probe use": (used, 4, True),
    "saliency": (maps, 3 * (6 + 4), True),
    "one map": (lambda lm: maps(lm, methods=["occlusion"]).methods[0].maps[1], 4, False),
}


@pytest.fixture(scope="module", params=list(MADE))
def made(request: pytest.FixtureRequest, llama: LanguageModel) -> tuple[Result, int, bool]:
    make, rows, svg = MADE[request.param]
    return make(llama), rows, svg


def test_a_result_prints_itself_in_a_few_lines(made: tuple[Result, int, bool]) -> None:
    result = made[0]
    text = repr(result)
    assert text.strip() == text != ""
    assert len(text.splitlines()) <= 12
    assert len(text) <= 1000, text
    assert max(map(len, text.splitlines())) <= 80, text
    assert "tensor(" not in text


def test_its_rows_are_a_table(made: tuple[Result, int, bool]) -> None:
    result, n, _ = made
    frame = result.to_frame()
    assert len(frame) == n or (n == 0 and len(frame) > 0)
    assert len({tuple(row) for row in result.rows()}) == 1
    assert all(isinstance(value, str | int | float | None) for row in result.rows() for value in row.values())


def test_it_is_saved_as_what_the_suffix_says(made: tuple[Result, int, bool], tmp_path: Path) -> None:
    result, _, svg = made
    n = len(result.rows())
    for suffix in ("json", "csv", "parquet", "html"):
        result.save(tmp_path / f"result.{suffix}")
    saved = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert saved == json.loads(json.dumps(plain(result._whole())))
    assert pyarrow.csv.read_csv(tmp_path / "result.csv").num_rows == n
    assert pyarrow.parquet.read_table(tmp_path / "result.parquet").num_rows == n
    page = (tmp_path / "result.html").read_text()
    assert escape(result.title) in page
    assert str(result.drawing())[:200] in page
    if svg:
        assert result.save(tmp_path / "result.svg").read_text().startswith("<svg")
    else:
        with pytest.raises(BadFile, match="no SVG"):
            result.save(tmp_path / "result.svg")


def test_a_notebook_shows_its_drawing(made: tuple[Result, int, bool]) -> None:
    html = made[0]._repr_html_()
    assert html.startswith("<iframe")
    assert "cw-" in html


def test_what_is_no_result_has_a_short_repr_too(llama: LanguageModel) -> None:
    sweep = swept(llama)
    assert repr(sweep.data) == "ProbeData: 24 examples in 24 groups, position rule 'last' (one 12, other 12)"
    assert repr(sweep.best.probe).startswith("logistic probe of one, other at blocks.")
    lens = observe.TunedLens(*_zeros(), None, "m", None, {})  # type: ignore[arg-type]
    assert repr(lens) == "TunedLens of m: 2 translators of width 3"


def _zeros() -> tuple[object, object]:
    import torch

    return torch.zeros(2, 3, 3), torch.zeros(2, 3)


def test_the_face_is_lazy_and_complete() -> None:
    code = "import sys; from cutaway import observe; print('torch' in sys.modules, 'transformers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]
    folder = Path(observe.__file__).parent
    inside = {path.stem for path in folder.iterdir()}
    assert not inside & set(observe.__all__)
    assert set(observe.__all__) <= set(dir(observe))
    for name in observe.__all__:
        assert getattr(observe, name).__doc__, name


def test_a_head_table_as_json_is_plain(llama: LanguageModel) -> None:
    assert json.dumps(plain(observe.head_table(llama, n=3, length=8, ablations=()).to_json()), allow_nan=False)

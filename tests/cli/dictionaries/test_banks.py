"""`cutaway dictionary banks`: each row is in a format that is read, or says that it is not, and can be found again."""

import json
import re
from datetime import date

import pytest

from cutaway.cli.main import main
from cutaway.dictionaries.banks import Bank, known_banks
from cutaway.dictionaries.formats.files import _READ, load
from cutaway.dictionaries.formats.hub import _ADDRESS

READ = {name for known in _READ for name in known.name.split(", ")}


@pytest.mark.parametrize("bank", known_banks(), ids=lambda bank: bank.load)
def test_every_row(bank: Bank) -> None:
    assert bank.readable == "yes" or re.fullmatch(r"no: \w.*", bank.readable)
    assert bank.readable != "yes" or bank.format in READ
    address = _ADDRESS.match(bank.load)
    assert address or bank.load.startswith(("atlas/", "FILE.pt, fetched from az://"))
    if address and bank.readable == "yes" and bank.kind != "transcoders":
        assert address[3], "a repository of many: the address of one of them is given"
    assert all((bank.model, bank.site, bank.width, bank.source))
    assert date(2025, 1, 1) <= date.fromisoformat(bank.date[:10])


def test_rows_differ() -> None:
    assert len({bank.load for bank in known_banks()}) == len(known_banks()) > 50
    models = [bank.model for bank in known_banks()]
    assert models == sorted(models, key=models.index), "the rows of a model stand together"
    assert load(known_banks()[0].load).d_sae == 4096


def test_the_list_and_its_filters(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["dictionary", "banks", "--model", "GEMMA-2-2b", "--format", "gemma scope"]) == 0
    printed = capsys.readouterr().out
    assert "      hf://google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71\n" in printed
    assert "pythia" not in printed
    assert all(len(line) <= 80 or "/" in line for line in printed.splitlines())
    assert main(["dictionary", "banks", "--json", "--format", "sparsify"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["choices"] == {"model": None, "format": "sparsify"}
    assert {row["format"] for row in found["figures"]["banks"]} == {"sparsify"}
    assert found["figures"]["banks"][0].keys() == Bank.__dataclass_fields__.keys()
    assert main(["dictionary", "banks", "--model", "bloom"]) == 2
    assert "no dictionary of model 'bloom' is known: models are atlas, gpt2" in capsys.readouterr().err

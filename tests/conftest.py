"""Fixtures that every test may use."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from cutaway.model.language_model import LanguageModel

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded: as the command line does

# A test's outcome must not hang on how busy or fast the machine is.
settings.register_profile("cutaway", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("cutaway")

REPOSITORY = Path(__file__).resolve().parent.parent


def shared_folder() -> Path | None:
    """The optional folder of real models and texts: `CUTAWAY_SHARED`, else `../shared` beside the checkout."""
    named = os.environ.get("CUTAWAY_SHARED")
    folder = Path(named) if named else REPOSITORY.parent / "shared"
    return folder if (folder / "models").is_dir() else None


@pytest.fixture(autouse=True, scope="session")
def no_status_line() -> Iterator[None]:
    """Commands that run in this process say nothing about loading; `tests/cli/test_early.py` looks at that line.

    Nor do they ask whether the hub answers, since many load a model of the test by a name that could be the hub's;
    `tests/artifacts/test_hub.py` does.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cutaway.cli.options.is_quiet", lambda: True)
        patch.setattr("cutaway.artifacts.hub.answers", lambda: True)
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and texts that developers have; users do not, so its tests skip."""
    folder = shared_folder()
    if folder is None:
        pytest.skip("the optional folder of real models is absent (set CUTAWAY_SHARED to its path)")
    return folder


@pytest.fixture(scope="module")  # there may be one Playwright at a time
def browser() -> Iterator[Any]:
    """The system's Chromium, headless; `CUTAWAY_CHROMIUM` names another."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    named = os.environ.get("CUTAWAY_CHROMIUM")
    path = named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium is installed (set CUTAWAY_CHROMIUM to its path)")
    quiet = ("quic", "background-networking", "component-update", "sync")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=path,
            args=[
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                *(f"--disable-{one}" for one in quiet),
            ],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def atlas() -> "LanguageModel":
    """The shipped model, loaded once."""
    import cutaway

    return cutaway.load("atlas")


@pytest.fixture(scope="session")
def tiny() -> "LanguageModel":
    """A random Llama of 3 layers, width 32, with a word a token: "<s>" (0), "<pad>" (1), then w2 to w60."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from cutaway.model.language_model import attach

    vocabulary = {"<s>": 0, "<pad>": 1, **{f"w{i}": i for i in range(2, 61)}}
    plain = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    plain.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() == 2 else 1)
        model.model.norm.weight.add_(0.3 * torch.randn(32))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", pad_token="<pad>")
    return attach(model, tokenizer, name="tiny")

"""Names, values, patching, lens and head scores beside TransformerLens 4's bridge, on raw weights."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peer_models import KINDS, rows, save
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import cutaway
from cutaway.model.language_model import LanguageModel

LENGTH, SWEPT, COPY = 11, 9, 8
RIGHT, WRONG = 5, 6

THEIRS = """
import os, sys
os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
import torch
from safetensors.torch import load_file, save_file
from transformer_lens import patching
from transformer_lens.head_detector import detect_head
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

torch.set_grad_enabled(False)
root, kinds, right, wrong = sys.argv[1], sys.argv[2].split(","), int(sys.argv[3]), int(sys.argv[4])
given = load_file(f"{root}/ids.safetensors")
heads = ("previous_token_head", "duplicate_token_head", "induction_head")
for kind in kinds:
    folder = f"{root}/{kind}"
    hf = AutoModelForCausalLM.from_pretrained(folder).eval()
    model = TransformerBridge.boot_transformers(folder, hf_model=hf, device="cpu")
    model.set_use_attn_result(True)
    out = {}
    logits, cache = model.run_with_cache(given["ids"])
    out["logits"] = logits
    out |= {f"cache:{name}": cache[name] for name in cache.keys()}
    out["head results"] = cache.stack_head_results(layer=-1)
    out["accumulated"] = cache.accumulated_resid(layer=-1)
    out["decomposed"] = cache.decompose_resid(layer=-1)
    lens = model.unembed(model.ln_final(cache.accumulated_resid(layer=-1)))
    out["lens"] = lens

    metric = lambda l: l[0, -1, right] - l[0, -1, wrong]
    _, clean = model.run_with_cache(given["clean"])
    for name in ("resid_pre", "attn_out", "mlp_out", "attn_head_out_all_pos", "attn_head_out_by_pos"):
        sweep = getattr(patching, f"get_act_patch_{name}")
        out[f"patch:{name}"] = sweep(model, given["corrupt"], clean, metric)
    words = " ".join(f"w{i}" for i in given["repeated"][0, 1:].tolist())
    text = next(t for t in (words, "<s> " + words) if torch.equal(model.to_tokens(t), given["repeated"]))
    _, cache = model.run_with_cache(given["repeated"], remove_batch_dim=True)
    for name in heads:
        out[f"score:{name}"] = detect_head(model, text, name, cache=cache)
    save_file({k: v.contiguous().clone() for k, v in out.items()}, f"{root}/{kind}.safetensors")
"""


@pytest.fixture(scope="module")
def compared(
    peer: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[LanguageModel, dict[str, Tensor]]]:
    """For each kind of model our view of it, and everything that TransformerLens said about the same files."""
    python = peer("transformerlens")
    root = tmp_path_factory.mktemp("transformerlens")
    for kind in KINDS:
        save(kind, root / kind)
    once = torch.randperm(90, generator=torch.Generator().manual_seed(3))[:COPY] + 2
    repeated = torch.cat([torch.tensor([0]), once, once])[None]
    given = {"ids": rows(2, LENGTH), "clean": rows(1, SWEPT, 1), "corrupt": rows(1, SWEPT, 2), "repeated": repeated}
    save_file(given, root / "ids.safetensors")
    done = subprocess.run(
        [python, "-c", THEIRS, str(root), ",".join(KINDS), str(RIGHT), str(WRONG)],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4_000:]
    return {
        kind: (
            cutaway.attach(
                AutoModelForCausalLM.from_pretrained(root / kind).eval(), AutoTokenizer.from_pretrained(root / kind)
            ),
            load_file(root / f"{kind}.safetensors") | {f"given:{name}": value for name, value in given.items()},
        )
        for kind in KINDS
    }


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest value; the cells that a mask closes must be the same."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    closed = theirs <= -1e30
    assert torch.equal(closed, ours <= -1e30)
    a, b = ours[~closed].double(), theirs[~closed].double()
    return ((a - b).abs().max() / b.abs().max()).item()


# What TransformerLens caches and no site of ours is: token ids, rotary tables, what passes between the final norm and
# the unembedding, queries and keys between QK-norm and rotary, a module's output before a norm that follows it.
NOT_OURS = re.compile(
    r"^(embed\.hook_in|pos_embed\.hook_in|rotary_emb\..*|ln_final\.hook_(in|out)|unembed\.hook_in"
    r"|blocks\.\d+\.attn\.(hook_(cos|sin|hidden_states|[qk]_normed)|[qk]_norm\..*))$"
)
BEFORE_A_NORM = re.compile(r"^blocks\.\d+\.(ln[12]_post\.hook_in|(attn|attn\.o|mlp|mlp\.out)\.hook_out)$")


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_that_resolves_has_the_same_values(kind: str, compared) -> None:
    """Each key of the peer's cache is one of our sites, or among those that are no site of ours."""
    lm, theirs = compared[kind]
    cached = {name.removeprefix("cache:"): value for name, value in theirs.items() if name.startswith("cache:")}
    resolved = {}
    for name in cached:
        try:
            resolved[name] = lm.sites().resolve(name)
        except cutaway.CutawayError:
            known = NOT_OURS.match(name) or (kind == "gemma2" and BEFORE_A_NORM.match(name))
            assert known, f"{name} is not among our aliases"
    run = lm.run(theirs["given:ids"], capture=sorted(set(resolved.values())))
    wrong = {
        name: (site, found)
        for name, site in resolved.items()
        if (found := error(run[site].reshape(cached[name].shape), cached[name])) > 1e-5
    }
    assert not wrong
    assert run.logits is not None
    assert error(run.logits, theirs["logits"]) <= 1e-5
    assert len(set(resolved.values())) >= 20 * lm.n_layers


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_stream_takes_apart_as_theirs_does(kind: str, compared) -> None:
    """accumulated_resid, decompose_resid and stack_head_results, from sites."""
    lm, theirs = compared[kind]
    embeds = ["embed", "pos_embed"] if kind == "gpt2" else ["embed"]
    sites = [
        "blocks.*.resid_pre",
        "blocks.*.resid_post",
        "blocks.*.attn.out",
        "blocks.*.mlp.out",
        "blocks.*.attn.result",
    ]
    run = lm.run(theirs["given:ids"], capture=[*embeds, *sites])
    last = run[f"blocks.{lm.n_layers - 1}.resid_post"]
    accumulated = torch.cat([run.stack("blocks.*.resid_pre"), last[None]])
    assert error(accumulated, theirs["accumulated"]) <= 1e-5
    parts = [run[name] for name in embeds]
    for layer in range(lm.n_layers):
        parts += [run[f"blocks.{layer}.attn.out"], run[f"blocks.{layer}.mlp.out"]]
    assert error(torch.stack(parts), theirs["decomposed"]) <= 1e-5
    heads = run.stack("blocks.*.attn.result").permute(0, 3, 1, 2, 4).flatten(0, 1)
    assert error(heads, theirs["head results"]) <= 1e-5


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "neox"])
def test_the_logit_lens_is_theirs(kind: str, compared) -> None:
    """Final norm with the stream's own statistics, then unembedding, at every layer."""
    lm, theirs = compared[kind]
    run = lm.run(theirs["given:ids"], capture=["blocks.*.resid_pre", "blocks.*.resid_post"])
    last = run[f"blocks.{lm.n_layers - 1}.resid_post"]
    ours = lm.unembed(torch.cat([run.stack("blocks.*.resid_pre"), last[None]]))
    assert error(ours, theirs["lens"]) <= 1e-5


def patched(lm: LanguageModel, clean: cutaway.Run, corrupt: Tensor, site: str, **where) -> Tensor:
    run = lm.run(corrupt, edits=cutaway.patch(site, clean, **where), logits="last")
    assert run.logits is not None
    return run.logits[0, -1, RIGHT] - run.logits[0, -1, WRONG]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "gemma2"])
def test_patching_gives_their_numbers(kind: str, compared) -> None:
    """Five of the peer's sweeps, cell by cell."""
    lm, theirs = compared[kind]
    corrupt, layers, places = theirs["given:corrupt"], range(lm.n_layers), range(SWEPT)
    sites = ["resid_pre", "attn.out", "mlp.out", "attn.z"]
    clean = lm.run(theirs["given:clean"], capture=[f"blocks.*.{site}" for site in sites])
    for name, site in (("resid_pre", "resid_pre"), ("attn_out", "attn.out"), ("mlp_out", "mlp.out")):
        ours = [[patched(lm, clean, corrupt, f"blocks.{i}.{site}", positions=p) for p in places] for i in layers]
        assert error(torch.tensor(ours), theirs[f"patch:{name}"]) <= 1e-5, name
    heads = range(lm.n_heads)
    ours = [[patched(lm, clean, corrupt, f"blocks.{i}.attn.z", heads=h) for h in heads] for i in layers]
    assert error(torch.tensor(ours), theirs["patch:attn_head_out_all_pos"]) <= 1e-5
    ours = [
        [[patched(lm, clean, corrupt, f"blocks.{i}.attn.z", heads=h, positions=p) for h in heads] for p in places]
        for i in layers
    ]
    assert error(torch.tensor(ours), theirs["patch:attn_head_out_by_pos"]) <= 1e-5


@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox"])
def test_head_scores_are_theirs_counted_over_rows_with_a_target(kind: str, compared) -> None:
    """Theirs is the mass on the pattern over all rows (each row's attention sums to 1), ours the mean over the rows
    that have a target: on T tokens twice after a BOS, T of 2T + 1 rows for two of the scores and 2T for the third.
    """
    lm, theirs = compared[kind]
    tokens = theirs["given:repeated"]
    pattern = lm.run(tokens, capture="blocks.*.attn.pattern").stack("blocks.*.attn.pattern")[:, 0]
    rows_with_target = {"previous_token_head": 2 * COPY, "duplicate_token_head": COPY, "induction_head": COPY}
    offset = {"previous_token_head": 1, "duplicate_token_head": COPY, "induction_head": COPY - 1}
    for name, n in rows_with_target.items():
        diagonal = pattern.diagonal(-offset[name], dim1=-2, dim2=-1)[..., -n:]
        expected = theirs[f"score:{name}"] * (2 * COPY + 1) / n
        assert error(diagonal.mean(-1), expected) <= 1e-5, name

"""Node scores beside TransformerLens' `attribution_patch`, on the same raw weights, pairs and metric.

Theirs take the gradient at the corrupt prompt and point to the clean one, so ours are asked in the direction "denoise";
exchanging the prompts gives ours in the direction "noise".
"""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peer_models import KINDS, rows, save
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import cutaway
from cutaway.causal.attribution.attribution_patching import attribution_patching
from cutaway.data.pairs import PromptPair

N, LENGTH, RIGHT, WRONG = 4, 9, 5, 6

THEIRS = """
import json, os, sys
os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
from safetensors.torch import load_file
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.attribution_patching import attribution_patch
from transformers import AutoModelForCausalLM

root, kinds, right, wrong = sys.argv[1], sys.argv[2].split(","), int(sys.argv[3]), int(sys.argv[4])
given = load_file(f"{root}/ids.safetensors")
for kind in kinds:
    folder = f"{root}/{kind}"
    hf = AutoModelForCausalLM.from_pretrained(folder).eval()
    model = TransformerBridge.boot_transformers(folder, hf_model=hf, device="cpu")
    metric = lambda logits: logits[0, -1, right] - logits[0, -1, wrong]
    found = {}
    for name, ends in {"denoise": ("clean", "corrupt"), "noise": ("corrupt", "clean")}.items():
        scored = attribution_patch(model, *(given[end] for end in ends), metric).node_scores
        found[name] = [[n.kind, n.layer, n.head, n.position, score] for n, score in scored.items()]
    with open(f"{root}/{kind}.json", "w") as file:
        json.dump(found, file)
"""


@pytest.fixture(scope="module")
def theirs(peer: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the models and, for each kind, the peer's scores."""
    python = peer("transformerlens")
    root = tmp_path_factory.mktemp("attribution")
    for kind in KINDS:
        save(kind, root / kind)
    save_file({"clean": rows(N, LENGTH, 1), "corrupt": rows(N, LENGTH, 2)}, root / "ids.safetensors")
    done = subprocess.run(
        [python, "-c", THEIRS, str(root), ",".join(KINDS), str(RIGHT), str(WRONG)],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4_000:]
    return root


@pytest.mark.parametrize("direction", ["noise", "denoise"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_agree(kind: str, direction: str, theirs: Path) -> None:
    lm = cutaway.attach(AutoModelForCausalLM.from_pretrained(theirs / kind).eval(), name=kind)
    ends = zip(rows(N, LENGTH, 1).tolist(), rows(N, LENGTH, 2).tolist(), strict=True)
    pairs = [PromptPair(tuple(clean), tuple(corrupt), RIGHT, WRONG) for clean, corrupt in ends]
    sites = ["embed", "blocks.*.attn.z", "blocks.*.mlp.out"]
    ours = attribution_patching(lm, pairs, sites, direction=direction, positions="each", check=0)  # type: ignore[arg-type]
    scores = json.loads((theirs / f"{kind}.json").read_text())[direction]
    places = {"embed": "embed", "attn_head_out": "blocks.{}.attn.z", "mlp_out": "blocks.{}.mlp.out"}
    found, expected = [], []
    for name, layer, head, position, score in scores:
        block = ours.blocks[places[name].format(layer)]
        found.append(block[position, head or 0].mean())
        expected.append(score)
    a, b = torch.stack(found).double(), torch.tensor(expected).double()
    assert len(b) == len(ours) == LENGTH * (1 + lm.n_layers * (lm.n_heads + 1))
    assert float((a - b).abs().max()) <= 1e-4 * float(b.abs().max())
    assert float(b.abs().max()) > 1e-3

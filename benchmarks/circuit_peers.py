"""Edge scores and circuits by one method at work in its own environment; benchmarks/circuits.py drives it by pipe.

    .venvs/eap_ig/bin/python benchmarks/circuit_peers.py eap_ig REQUEST

Only what that environment holds is imported. REQUEST is a JSON object (`Load`); then each line of the input is
`{"do": "first" | "time", "task", "options", "file"}` and gets one JSON line as its answer. `first` also measures the
peak of the resident memory and writes what the task returns to `file`. A method's own printing goes to the error
stream.

The peer EAP-IG is a checkout that is used as it is. It names a GPU where it allocates, and reads texts: in its modules
`torch.zeros` is one that leaves the device out, and its `tokenize_plus` is one that takes token ids. Nothing else
is changed, and neither costs it time: reading ids is less work than reading texts.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer_worker import peak_over, resident

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"


@dataclass(frozen=True)
class Load:
    """A model's folder, the file of pairs (clean, corrupt [n, T]; answer, wrong [n]), threads, the peer's checkout."""

    folder: str
    data: str
    threads: int
    checkout: str = ""


@dataclass(frozen=True)
class Task:
    """`work(options)` is what is timed; `read` makes tensors of what it returns."""

    work: Callable[[dict[str, Any]], Any]
    read: Callable[[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Method:
    """Tasks by name; `sources` and `destinations` say, in our names, what rows and columns of its matrices are."""

    version: str
    sources: list[str]
    destinations: list[str]
    tasks: dict[str, Task]


def touch(model: Any) -> None:
    """Read every weight once: a file that is mapped would otherwise become resident in what is measured."""
    for parameter in model.parameters():
        parameter.detach().sum()


def cutaway(load: Load) -> Method:
    """Ours, on the model as transformers loads it."""
    from importlib.metadata import version

    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from cutaway.causal.attribution.attribution_patching import GradientOptions, attribution_patching
    from cutaway.causal.circuits.gradient_scores import eap, eap_ig
    from cutaway.causal.circuits.runs import run_circuits
    from cutaway.causal.edge_graph import EdgeGraph
    from cutaway.data.pairs import PromptPair, aligned
    from cutaway.model.language_model import attach

    lm = attach(AutoModelForCausalLM.from_pretrained(load.folder).eval(), name="random")
    touch(lm.hf)
    graph = EdgeGraph.of(lm)
    data = load_file(load.data)
    rows = zip(*(data[name].tolist() for name in COLUMNS), strict=True)
    pairs = aligned(lm, [PromptPair(tuple(a), tuple(b), answer, wrong) for a, b, answer, wrong in rows], strict=True)

    def logits(options: dict[str, Any]) -> Any:
        return lm.run(pairs.clean, logits="last").logits

    def scores(options: dict[str, Any]) -> Any:
        return eap(lm, pairs)

    def integrated(options: dict[str, Any]) -> Any:
        return eap_ig(lm, pairs, steps=options["steps"])

    def denoised(options: dict[str, Any]) -> Any:
        return eap(lm, pairs, direction="denoise")

    sites = ["embed"]  # of the sources, in the graph's order
    for layer in range(lm.n_layers):
        sites += [f"blocks.{layer}.attn.z", f"blocks.{layer}.mlp.out"]

    def nodes(options: dict[str, Any]) -> Any:
        asked = GradientOptions(batch_rows=options.get("batch", 64))
        return attribution_patching(lm, pairs, sites, direction="denoise", check=0, options=asked)

    def read_nodes(made: Any) -> dict[str, Any]:
        return {"scores": torch.cat([made.blocks[site].mean(-1)[0] for site in sites])}

    def circuits(options: dict[str, Any]) -> Any:
        return run_circuits(lm, pairs, masks_of(options), "logit_difference", graph=graph)

    def read(made: Any) -> dict[str, Any]:
        return {"scores": made.values, "clean": made.clean, "corrupt": made.corrupt}

    tasks = {
        "logits": Task(logits, lambda made: {"logits": made[:, -1]}),
        "eap": Task(scores, read),
        "eap_ig": Task(integrated, read),
        "edges": Task(denoised, read),
        "nodes": Task(nodes, read_nodes),
        "circuits": Task(circuits, lambda made: {"values": made.values}),
    }
    return Method(version("torch"), list(graph.sources), list(graph.destinations), tasks)


def masks_of(options: dict[str, Any]) -> Any:
    """The circuits that a request names, bool [C, F, G] in the order of this method's matrices."""
    from safetensors.torch import load_file

    return load_file(options["masks"])["masks"].bool()


COLUMNS = ("clean", "corrupt", "answer", "wrong")


def hooked(folder: str) -> Any:
    """The model as TransformerLens 2 or 3 holds it, weights as they are, with all that the peer hooks into."""
    import torch
    from transformer_lens import (  # pyright: ignore[reportMissingImports]
        HookedTransformer,
        HookedTransformerConfig,
    )
    from transformer_lens.pretrained import weight_conversions  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM

    hf: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    c = hf.config
    heads = c.num_attention_heads
    shape = {
        "n_layers": c.num_hidden_layers, "d_model": c.hidden_size, "n_heads": heads, "d_head": c.hidden_size // heads,
        "d_vocab": c.vocab_size, "n_ctx": c.max_position_embeddings, "device": "cpu", "dtype": torch.float32,
        "use_attn_result": True, "use_split_qkv_input": True, "use_hook_mlp_in": True,
    }  # fmt: skip
    if c.model_type == "gpt2":
        convert = weight_conversions.convert_gpt2_weights
        shape |= {
            "d_mlp": c.n_inner or 4 * c.n_embd, "eps": c.layer_norm_epsilon, "act_fn": c.activation_function,
            "normalization_type": "LN", "use_attn_scale": True,
        }  # fmt: skip
    elif c.model_type == "llama":
        convert = weight_conversions.convert_llama_weights
        grouped = c.num_key_value_heads != heads
        shape |= {
            "d_mlp": c.intermediate_size, "eps": c.rms_norm_eps, "act_fn": c.hidden_act, "normalization_type": "RMS",
            "positional_embedding_type": "rotary", "rotary_adjacent_pairs": False, "rotary_dim": c.hidden_size // heads,
            "final_rms": True, "gated_mlp": True, "n_key_value_heads": c.num_key_value_heads if grouped else None,
            "ungroup_grouped_query_attention": grouped,
        }  # fmt: skip
    else:
        raise ValueError(f"no conversion of a {c.model_type}")
    model = HookedTransformer(HookedTransformerConfig(**shape), move_to_device=False)
    model.load_and_process_state_dict(
        convert(hf, model.cfg), fold_ln=False, center_writing_weights=False, center_unembed=False,
        fold_value_biases=False,
    )  # fmt: skip
    return model.eval()


class OnCpu:
    """The torch that the peer's modules see: `zeros` leaves a device out."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)

    def zeros(self, *size: Any, device: Any = None, **named: Any) -> Any:
        return self._torch.zeros(*size, **named)


def peer_name(name: str) -> str:
    """Our name of a source or destination of EAP-IG: `a3.h7<q>` is L3H7.q, `m3` L3.mlp, `input` embed."""
    if name in ("input", "logits"):
        return {"input": "embed"}.get(name, name)
    if name.startswith("m"):
        return f"L{name[1:]}.mlp"
    layer, _, head = name[1:].partition(".h")
    return f"L{layer}H{head.replace('<', '.').rstrip('>')}"


def eap_ig(load: Load) -> Method:
    """The checkout of EAP-IG over TransformerLens; its parameters take gradients, as it leaves them."""
    from importlib.metadata import version

    import torch
    from safetensors.torch import load_file

    sys.path.insert(0, str(Path(load.checkout) / "src"))
    from eap import attribute, evaluate, graph, utils  # pyright: ignore[reportMissingImports]

    def tokenize(model: Any, inputs: list[Any], max_length: int | None = None) -> tuple[Any, ...]:
        ids = torch.stack(inputs)
        mask = torch.ones_like(ids)
        return ids, mask, mask.sum(1), ids.shape[1]

    for module in (attribute, evaluate, utils):
        module.torch = OnCpu(torch)
        module.tokenize_plus = tokenize
    model = hooked(load.folder)
    touch(model)
    data = load_file(load.data)
    labels = torch.stack([data["answer"], data["wrong"]], 1)
    n = len(labels)

    def batches(size: int) -> list[tuple[list[Any], list[Any], Any]]:
        return [
            (list(data["clean"][i : i + size]), list(data["corrupt"][i : i + size]), labels[i : i + size])
            for i in range(0, n, size)
        ]

    def difference(logits: Any, clean_logits: Any, lengths: Any, label: Any) -> Any:
        last = logits[torch.arange(len(logits)), lengths - 1]
        found = last.gather(-1, label)
        return found[:, 0] - found[:, 1]

    def summed(*arguments: Any) -> Any:
        return difference(*arguments).sum()

    def attributed(method: str) -> Callable[[dict[str, Any]], Any]:
        def work(options: dict[str, Any]) -> Any:
            made = graph.Graph.from_model(model)
            attribute.attribute(
                model, made, batches(options["batch"]), summed, method, ig_steps=options.get("steps"), quiet=True
            )
            return made

        return work

    def circuits(options: dict[str, Any]) -> Any:
        made, values = graph.Graph.from_model(model), []
        for mask in masks_of(options):
            made.in_graph[:] = mask
            values.append(evaluate.evaluate_graph(model, made, batches(options["batch"]), difference, quiet=True))
        return torch.stack(values)

    def logits(options: dict[str, Any]) -> Any:
        with torch.no_grad():
            return model(data["clean"], attention_mask=torch.ones_like(data["clean"]))[:, -1]

    def read(made: Any) -> dict[str, Any]:
        clean, corrupt = (
            evaluate.evaluate_baseline(model, batches(n), difference, run_corrupted=run, quiet=True)
            for run in (False, True)
        )
        return {"scores": made.scores, "clean": clean, "corrupt": corrupt}

    names = graph.Graph.from_model(model)
    sources = [peer_name(name) for name in names.nodes if name != "logits"]
    destinations = [peer_name(name) for name in names.get_dst_nodes()]
    tasks = {
        "logits": Task(logits, lambda made: {"logits": made}),
        "eap": Task(attributed("EAP"), read),
        "eap_ig": Task(attributed("EAP-IG-inputs"), read),
        "circuits": Task(circuits, lambda made: {"values": made}),
    }
    return Method(f"over TransformerLens {version('transformer-lens')}", sources, destinations, tasks)


def transformerlens(load: Load) -> Method:
    """TransformerLens 4's attribution patching: at the corrupt prompt, each pair by itself, edges by position."""
    from importlib.metadata import version

    import torch
    from safetensors.torch import load_file
    from transformer_lens.model_bridge import TransformerBridge  # pyright: ignore[reportMissingImports]
    from transformer_lens.tools.analysis.attribution_patching import (  # pyright: ignore[reportMissingImports]
        EdgeAttributionConfig,
        attribution_patch,
    )
    from transformers import AutoModelForCausalLM

    hf: Any = AutoModelForCausalLM.from_pretrained(load.folder).eval()
    model = TransformerBridge.boot_transformers(load.folder, hf_model=hf, device="cpu")
    model.eval()
    touch(model)
    data = load_file(load.data)
    n, layers, heads = len(data["clean"]), model.cfg.n_layers, model.cfg.n_heads

    def patched(granularity: str) -> Callable[[dict[str, Any]], list[Any]]:
        def work(options: dict[str, Any]) -> list[Any]:
            config = EdgeAttributionConfig(granularity=granularity)
            made = []
            for i in range(n):  # answers differ from pair to pair, and its metric is told of the logits alone
                answer, wrong = int(data["answer"][i]), int(data["wrong"][i])

                def difference(logits: Any, answer: int = answer, wrong: int = wrong) -> Any:
                    return logits[0, -1, answer] - logits[0, -1, wrong]

                made.append(
                    attribution_patch(model, data["clean"][i : i + 1], data["corrupt"][i : i + 1], difference, config)
                )
            return made

        return work

    sources = ["embed"]
    destinations = []
    for layer in range(layers):
        sources += [f"L{layer}H{head}" for head in range(heads)] + [f"L{layer}.mlp"]
        destinations += [f"L{layer}H{head}.{part}" for part in "qkv" for head in range(heads)] + [f"L{layer}.mlp"]
    destinations.append("logits")
    row, column = ({name: i for i, name in enumerate(names)} for names in (sources, destinations))

    def name_of(node: Any) -> str:
        part = {"attn_head_out": "", "q_input": ".q", "k_input": ".k", "v_input": ".v"}.get(node.kind)
        if part is not None:
            return f"L{node.layer}H{node.head}{part}"
        return f"L{node.layer}.mlp" if node.kind.startswith("mlp") else node.kind

    def edges(made: list[Any]) -> dict[str, Any]:
        scores = torch.zeros(len(sources), len(destinations), dtype=torch.float64)
        for result in made:
            for (source, destination), score in result.edge_scores.items():
                scores[row[name_of(source)], column[name_of(destination)]] += score / n
        return {"scores": scores}

    def nodes(made: list[Any]) -> dict[str, Any]:
        scores = torch.zeros(len(sources), dtype=torch.float64)
        for result in made:
            for node, score in result.node_scores.items():
                scores[row[name_of(node)]] += score / n
        return {"scores": scores}

    def logits(options: dict[str, Any]) -> Any:
        with torch.no_grad():
            return model(data["clean"])[:, -1]

    tasks = {
        "logits": Task(logits, lambda made: {"logits": made}),
        "edges": Task(patched("edge"), edges),
        "nodes": Task(patched("node"), nodes),
    }
    return Method(version("transformer-lens"), sources, destinations, tasks)


METHODS: dict[str, Callable[[Load], Method]] = {
    "cutaway": cutaway, "eap_ig": eap_ig, "transformerlens": transformerlens,
}  # fmt: skip


def first(task: Task, options: dict[str, Any], file: str) -> dict[str, Any]:
    """Run a task for the first time: bytes resident before, and at most meanwhile; its tensors go to the file."""
    from safetensors.torch import save_file

    made: list[Any] = []
    before = resident("VmRSS")
    peak_over(lambda: made.append(task.work(options)))
    most = resident("VmHWM")
    tensors = {name: value.detach().contiguous().clone() for name, value in task.read(made[0]).items()}
    save_file(tensors, file)
    return {"loaded": before, "most": most}


def serve(name: str, load: Load) -> None:
    """Answer requests until the input ends; the first answer says what was loaded."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(load.threads)
    method = METHODS[name](load)
    about = {"version": method.version, "sources": method.sources, "destinations": method.destinations}
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        task, options = method.tasks[request["task"]], request["options"]
        try:
            if request["do"] == "first":
                answer = first(task, options, request["file"])
            else:
                start = time.perf_counter()
                task.work(options)
                answer = {"seconds": time.perf_counter() - start}
        except Exception as error:  # whatever a method raises is the driver's to report
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], Load(**json.loads(sys.argv[2])))

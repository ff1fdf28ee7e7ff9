"""A peer library at work in its own environment: benchmarks/model_access.py drives it over pipes, line by line.

    .venvs/transformerlens/bin/python benchmarks/peer_worker.py transformerlens

Each line of the input is a JSON object: `{"do": "load", "model", "folder"}`, `{"do": "time", "model", "task", "ids",
"threads", "repeats", "options"}` or `{"do": "values", ..., "file"}` with the same; each gets one JSON line as its
answer. Only what the peer's environment holds is imported here. The peer's own printing goes to the error stream, so
that it cannot mix with the answers.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"  # a bar redrawn 144 times a sweep would be part of what is timed

Task = Callable[..., dict[str, Any]]
"""Of (model, ids, options): tensors by name, made by one unit of work."""


def transformerlens() -> tuple[Callable[[str], Any], dict[str, Task]]:
    """TransformerLens 4: the bridge over the same weights, with raw weights as it loads them."""
    import pandas
    import torch
    from transformer_lens import patching  # pyright: ignore[reportMissingImports]
    from transformer_lens.model_bridge import TransformerBridge  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM

    def load(folder: str) -> Any:
        return TransformerBridge.boot_transformers(
            folder, hf_model=AutoModelForCausalLM.from_pretrained(folder).eval(), device="cpu"
        )

    def forward(model: Any, ids: torch.Tensor, options: dict[str, Any]) -> dict[str, Any]:
        return {"logits": model(ids)}

    def captures(model: Any, ids: torch.Tensor, options: dict[str, Any]) -> dict[str, Any]:
        names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
        _, cache = model.run_with_cache(ids, names_filter=names)
        return {name: cache[name] for name in names}

    def pattern(model: Any, ids: torch.Tensor, options: dict[str, Any]) -> dict[str, Any]:
        name = f"blocks.{options['layer']}.attn.hook_pattern"
        _, cache = model.run_with_cache(ids, names_filter=[name])
        return {"pattern": cache[name]}

    cached: dict[Any, Any] = {}  # the clean run is not part of what is timed

    def sweep(kind: str, model: Any, ids: torch.Tensor, options: dict[str, Any]) -> dict[str, Any]:
        clean, corrupt = ids[:1], ids[1:]
        right, wrong = options["answers"]
        key = (id(model), kind, clean.shape)
        if key not in cached:
            end = {"heads": "hook_z", "positions": "hook_resid_pre"}[kind]
            cached[key] = model.run_with_cache(clean, names_filter=lambda name: name.endswith(end))[1]
        cache = cached[key]

        def metric(logits: torch.Tensor) -> torch.Tensor:
            return logits[0, -1, right] - logits[0, -1, wrong]

        whole = {
            "heads": (patching.get_act_patch_attn_head_out_all_pos, patching.layer_head_vector_patch_setter, "z"),
            "positions": (patching.get_act_patch_resid_pre, patching.layer_pos_patch_setter, "resid_pre"),
        }
        helper, setter, name = whole[kind]
        if options.get("cells") is None:
            return {"metric": helper(model, corrupt, cache, metric).flatten()}
        columns = ["layer", "head" if kind == "heads" else "pos"]
        chosen = pandas.DataFrame(options["cells"], columns=columns)  # pyright: ignore[reportArgumentType]
        return {
            "metric": patching.generic_activation_patch(model, corrupt, cache, metric, setter, name, index_df=chosen)
        }

    def heads(model: Any, ids: torch.Tensor, options: dict[str, Any]) -> dict[str, Any]:
        return sweep("heads", model, ids, options)

    def positions(model: Any, ids: torch.Tensor, options: dict[str, Any]) -> dict[str, Any]:
        return sweep("positions", model, ids, options)

    tasks: dict[str, Task] = {
        "forward": forward, "captures": captures, "pattern": pattern, "heads": heads, "positions": positions,
    }  # fmt: skip
    return load, tasks


def nnsight() -> tuple[Callable[[str], Any], dict[str, Task]]:
    """nnsight 0.8: a trace over the Hugging Face model itself."""
    import nnsight as library  # pyright: ignore[reportMissingImports]
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load(folder: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        return library.LanguageModel(model, tokenizer=AutoTokenizer.from_pretrained(folder))

    def layers(model: Any) -> Any:
        return model.transformer.h if hasattr(model, "transformer") else model.model.layers

    def forward(model: Any, ids: torch.Tensor, options: dict[str, Any]) -> dict[str, Any]:
        with model.trace(ids):
            out = model.output.save()
        return {"logits": out.logits}

    def captures(model: Any, ids: torch.Tensor, options: dict[str, Any]) -> dict[str, Any]:
        with model.trace(ids):
            saved = library.save([layer.output for layer in layers(model)])
        tensors = [value[0] if isinstance(value, tuple) else value for value in saved]
        return {f"blocks.{i}.hook_resid_post": value for i, value in enumerate(tensors)}

    return load, {"forward": forward, "captures": captures}


DISTRIBUTIONS = {"transformerlens": "transformer-lens", "nnsight": "nnsight"}
PEERS = {"transformerlens": transformerlens, "nnsight": nnsight}


def resident(field: str) -> int:
    """Bytes of `VmRSS` or `VmHWM` of this process, 0 where the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0


def peak_over(work: Callable[[], object]) -> int:
    """Bytes by which the resident memory rises at most while `work` runs (Linux; 0 elsewhere)."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # sets the high-water mark back to what is resident now
    before = resident("VmRSS")
    work()
    return max(0, resident("VmHWM") - before)


def serve(peer: str) -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    torch.set_grad_enabled(False)
    load, tasks = PEERS[peer]()
    models: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "load":
                models[request["model"]] = load(request["folder"])
                answer: dict[str, Any] = {"version": version(DISTRIBUTIONS[peer])}
            else:
                answer = work(models[request["model"]], tasks[request["task"]], request)
        except Exception as error:  # whatever the peer raises is the driver's to report
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def work(model: Any, task: Task, request: dict[str, Any]) -> dict[str, Any]:
    """Time a task, or write what it returns to a file."""
    import torch
    from safetensors.torch import save_file

    ids = torch.tensor(request["ids"])
    torch.set_num_threads(request["threads"])
    options = request.get("options", {})
    if request["do"] == "time":
        start = time.perf_counter()
        for _ in range(request["repeats"]):
            task(model, ids, options)
        return {"seconds": (time.perf_counter() - start) / request["repeats"]}
    made: dict[str, Any] = {}
    peak = peak_over(lambda: made.update(task(model, ids, options)))
    save_file({name: value.contiguous().clone() for name, value in made.items()}, request["file"])
    return {"peak": peak}


if __name__ == "__main__":
    serve(sys.argv[1])

"""Commands in processes of their own, killed at random moments; run by test_killed_commands.py.

    python killed_commands.py FOLDER SEED

Each command writes into FOLDER/NAME/whole without being disturbed, then into FOLDER/NAME/killed, where it is killed
several times before it may end, and twice at once into FOLDER/NAME/both. Prints what happened as JSON: the kills of
each, the files that were there after one and were not whole, the exit codes.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cutaway.cli.main import main as cutaway

KILLS = 4


def write_model(folder: Path) -> None:
    """A random Llama of 2 layers with a word per token, as a Hugging Face folder."""
    vocabulary = {"<s>": 0, "<pad>": 1, **{f"w{i}": i for i in range(2, 61)}}
    plain = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    plain.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def write_inputs(folder: Path) -> None:
    """Prompt pairs, and a corpus as text and as Parquet."""
    import pyarrow
    import pyarrow.parquet

    drawn = random.Random(0)
    rows = [[drawn.randint(2, 60) for _ in range(5)] for _ in range(24)]
    pairs = [
        {
            "clean": " ".join(f"w{i}" for i in row),
            "corrupt": " ".join(f"w{i}" for i in [*row[:2], (row[2] + 7) % 59 + 2, *row[3:]]),
            "answer": f" w{3 + n}",
            "wrong": f" w{30 + n}",
        }
        for n, row in enumerate(rows)
    ]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    texts = [" ".join(f"w{drawn.randint(2, 60)}" for _ in range(60)) for _ in range(400)]
    (folder / "corpus.txt").write_text("\n\n".join(texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "corpus.parquet")


def commands(folder: Path) -> dict[str, Callable[[Path], list[str]]]:
    """Words of each command, from the folder it writes into."""
    model, pairs = str(folder / "model"), str(folder / "pairs.json")
    quick = ["--pairs", pairs, "--force", "--quick", "--draws", "5", "--size", "20%"]
    return {
        "circuit": lambda out: [
            "circuit", model, *quick, "--out", str(out / "circuit.json"), "--html", str(out / "page.html"),
        ],
        "tasks": lambda out: [
            "tasks", model, "--task", pairs, "--split", "search", "--out", str(out / "written.json"),
            "--html", str(out / "page.html"),
        ],
        "tour": lambda out: ["tour", model, "--corpus", str(folder / "corpus.txt"), "--out", str(out / "tour")],
        "harvest": lambda out: [
            "harvest", model, "--corpus", str(folder / "corpus.parquet"), "--site", "blocks.1.resid_post",
            "--format", "parquet", "--shard-tokens", "2000", "--batch", "4", "--out", str(out / "store"),
        ],
    }  # fmt: skip


def start(words: list[str], log: Path) -> int:
    """Begin a command in a forked process, which inherits what was imported."""
    if child := os.fork():
        return child
    code = 70
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = cutaway(words)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 70
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """The exit code of a process, once it has ended; 137 after a kill."""
    status = os.waitpid(child, 0)[1]
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def broken(folder: Path) -> list[str]:
    """Files under their own names that are not whole: JSON that does not parse, pages that do not end."""
    found = []
    for path in folder.rglob("*"):
        if not path.is_file() or path.name.endswith((".tmp", ".jsonl")) or ".tmp" in str(path.relative_to(folder)):
            continue
        if path.suffix == ".json":
            try:
                json.loads(path.read_text())
            except ValueError:
                found.append(path.name)
        elif path.suffix == ".html" and not path.read_text().rstrip().endswith("</html>"):
            found.append(path.name)
    return found


def disturb(words: Callable[[Path], list[str]], folder: Path, chance: random.Random) -> dict[str, Any]:
    """Run one command whole, killed and twice at once."""
    log = folder.with_suffix(".log")
    for name in ("whole", "killed", "both"):
        (folder / name).mkdir(parents=True)
    begun = time.monotonic()
    codes = [ended(start(words(folder / "whole"), log))]
    seconds = time.monotonic() - begun
    kills, halves = 0, []
    for part in range(KILLS):  # each in its quarter of the time that the command takes
        child = start(words(folder / "killed"), log)
        time.sleep(seconds * (part + chance.random()) / KILLS)
        os.kill(child, signal.SIGKILL)
        kills += ended(child) == 128 + signal.SIGKILL
        halves += broken(folder / "killed")
    codes.append(ended(start(words(folder / "killed"), log)))
    at_once = [start(words(folder / "both"), log) for _ in range(2)]
    return {"codes": codes, "kills": kills, "broken": halves, "both": [ended(child) for child in at_once]}


def main(folder: Path, seed: int) -> None:
    torch.set_num_threads(1)
    write_model(folder / "model")
    write_inputs(folder)
    chance = random.Random(seed)
    found = {name: disturb(words, folder / name, chance) for name, words in commands(folder).items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

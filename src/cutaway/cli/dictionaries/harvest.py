"""`cutaway harvest`: the activations of a model on a corpus, in a folder."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from cutaway.cli.fit import say
from cutaway.cli.options import Count, DType, Flag, Separator, announce, opened
from cutaway.cli.output import print_result


def harvest(
    model: str,
    /,
    *,
    corpus: str,
    site: Annotated[list[str], Parameter(negative="")],
    out: Path,
    tokens: Count | None = None,
    context: Count | None = None,
    packing: Literal["packed", "document"] = "packed",
    store: Literal["float32", "float16", "bfloat16"] | None = None,
    keep_bos: Flag = False,
    keep_first: Flag = False,
    high_norm: float | None = None,
    flatten: Flag = False,
    batch: Count = 16,
    shard_tokens: Count | None = None,
    format: Literal["safetensors", "parquet"] = "safetensors",
    field: str = "text",
    split: str = "train",
    document_separator: Separator = None,
    verify: Flag = False,
    dtype: DType = None,
    device: str | None = None,
    json: Flag = False,
) -> None:
    """Write a model's activations on a corpus into a folder of shards, each vector with the token it belongs to.

    The same command goes on where an interrupted one stopped. Under torchrun each process writes its share.

    Parameters
    ----------
    model
        “atlas”, a Hugging Face folder, or a hub id.
    corpus
        A text file or a folder of them (.txt, .md, .py, .jsonl, .parquet), or hub:NAME for a data set of the hub.
    site
        A site with one vector per token, such as blocks.3.resid_post, or a wildcard; may be given several times.
    out
        The folder: a new one, an empty one, or one that this command began.
    tokens
        Stop after so many tokens; all of the corpus if not given.
    context
        Tokens that the model reads at once; 256, or all that a smaller model reads, if not given.
    packing
        “packed”: documents are joined and cut into full rows. “document”: each has its own row, and is cut at its end.
    store
        How values are stored; as the model computes them if not given.
    keep_bos
        Keep beginning-of-text tokens, whose vectors are often extreme.
    keep_first
        Keep the first token of each row, for which the same is true.
    high_norm
        Leave out tokens whose vector is longer than so many times the median at any site.
    flatten
        Store sites by head as one vector instead of [heads, width].
    batch
        Rows in a forward pass.
    shard_tokens
        Tokens in a shard; as many as fill about 256 MiB if not given.
    format
        The format of the shards.
    field
        Where a record of a .jsonl or .parquet file, or of a data set, has its text.
    split
        Which split of a data set.
    document_separator
        What stands between documents in the text, such as “<|endoftext|>” (wherever it is) or “---” (alone on a line);
        .txt files are cut at blank lines if not given.
    verify
        Of a folder that is finished already, compare the hashes of all shards; else this is done up to 1 GiB, and of
        more only the sizes are looked at.
    device
        cpu, cuda, cuda:1, ...; a GPU if there is one (under torchrun each process its own), else the CPU, if not given.
    json
        Print what the store holds as JSON on stdout, and nothing else.
    """
    from cutaway.data.corpus.documents import documents_of

    documents = documents_of(corpus, field=field, split=split, document_separator=document_separator)
    announce(model)
    from cutaway.data.harvesting.harvest import harvest as run
    from cutaway.data.harvesting.settings import Rules, Storage

    rules = Rules(
        bos="keep" if keep_bos else "drop", first_position="keep" if keep_first else "drop", high_norm=high_norm
    )
    lm = opened(model, dtype=dtype, device=device or _own_gpu())
    made = run(
        lm,
        documents,
        site,
        out=out,
        tokens=tokens,
        context=context,
        packing=packing,
        rules=rules,
        batch_rows=batch,
        storage=Storage(store, "flatten" if flatten else "keep", shard_tokens, format, verify),
    )
    if json:
        print_result(
            {
                "folder": str(out),
                "id": made.manifest.id,
                "tokens": len(made),
                "sites": {name: list(shape) for name, shape in made.sites.items()},
                "dtype": str(made.dtype).removeprefix("torch."),
                "shards": len(made.shards),
                "counts": made.counts,
                "thresholds": made.thresholds,
                "corpus_hash": made.manifest.corpus_hash,
            },
            model=lm.name,
        )
        return
    say(str(made))
    print(f"  folder  {out}")


def _own_gpu() -> str | None:
    """Under torchrun each process has a GPU of its own, where there are GPUs."""
    import os

    import torch

    rank = os.environ.get("LOCAL_RANK", "")
    return f"cuda:{rank}" if rank.isdigit() and torch.cuda.is_available() else None

"""`cutaway sites`: which tensors of a model can be read and edited, and under which names."""

from cutaway.cli.options import Flag, ModuleFile, announce, opened
from cutaway.cli.output import print_result, print_table


def sites(model: str | None = None, /, *, module: ModuleFile = None, json: Flag = False) -> None:
    """Print the names, dimensions and meanings of a model's sites; an absent one says why.

    Parameters
    ----------
    model
        “atlas”, a Hugging Face folder, or a hub id.
    module
        Instead of the model, a model of your own: FILE.py:function, which returns a module, (module, description) or
        (module, description, tokenizer).
    json
        Print every site of every layer as JSON on stdout, and nothing else.
    """
    announce(model, module)
    lm = opened(model, module)
    table = lm.sites()
    if json:
        found = [
            {
                "name": site.name,
                "dims": site.dims,
                "shape": list(site.shape),
                "meaning": site.meaning,
                "absent": site.absent,
            }
            for site in table
        ]
        print_result({"sites": found}, model=lm.name)
        return
    # one line for all layers that agree: (kind, shape, reason) -> their layer numbers
    groups: dict[tuple[str, str, str, str], list[int]] = {}
    for site in table:
        says = f"absent: {site.absent}" if site.absent else site.meaning
        layers = groups.setdefault((site.kind.name, site.dims, " ".join(map(str, site.shape)), says), [])
        if site.layer is not None:
            layers.append(site.layer)
    print_table(
        ("site", "layers", "dims", "shape", "meaning"),
        [(name, layer_ranges(layers), dims, shape, says) for (name, dims, shape, says), layers in groups.items()],
    )


def layer_ranges(layers: list[int]) -> str:
    """Layer numbers as ranges: [0, 1, 2, 5] -> "0-2, 5"."""
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)

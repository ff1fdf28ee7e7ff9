"""`cutaway open`: one live page, on this machine, to look into a model and change it."""

from typing import Annotated

from cyclopts import Parameter, validators

from cutaway.cli.options import DType, Flag, ModuleFile, announce, opened

Port = Annotated[int, Parameter(validator=validators.Number(gte=0, lt=2**16))]


def open_page(
    model: str | None = None,
    /,
    *,
    port: Port = 8765,
    no_browser: Flag = False,
    module: ModuleFile = None,
    dtype: DType = None,
    device: str | None = None,
) -> None:
    """Open a live page: type a text, see lens, attention and attribution, click to patch or ablate. Ctrl-C ends it.

    The page is served to this machine alone and asks the network for nothing.

    Parameters
    ----------
    model
        “atlas”, a Hugging Face folder, or a hub id.
    port
        Where on 127.0.0.1; 0 is any free port.
    no_browser
        Print the address and open no browser.
    module
        Instead of the model, a model of your own: FILE.py:function, which returns a module, (module, description) or
        (module, description, tokenizer).
    device
        cpu, cuda, cuda:1, ...; a GPU if there is one, else the CPU, if not given.
    """
    from cutaway.serve.address import listen, require_extra

    require_extra()
    announce(model, module)
    with listen(port) as listening:
        lm = opened(model, module, dtype=dtype, device=device)

        from cutaway.serve.server import serve_page

        serve_page(lm, listening, browser=not no_browser)

"""`cutaway dictionary banks`: which dictionaries of others there are, and how each is loaded."""

from cutaway.cli.fit import say
from cutaway.cli.options import Flag
from cutaway.cli.output import print_result


def banks(*, model: str | None = None, format: str | None = None, json: Flag = False) -> None:
    """List public dictionaries: by model their width, format and site, and an address that “cutaway dictionary” loads.

    Parameters
    ----------
    model
        Only those of models with this in their name, such as gemma-2-2b.
    format
        Only those in formats with this in their name, such as sparsify.
    json
        Print the list as JSON on stdout, with source and date of each row, and nothing else.
    """
    from dataclasses import asdict
    from itertools import groupby

    from cutaway.dictionaries.banks import find_banks

    found = find_banks(model, format)
    if json:
        print_result({"banks": [asdict(bank) for bank in found]})
        return
    widths = [max(len(getattr(bank, name)) for bank in found) for name in ("width", "format")]
    for model, some in groupby(found, key=lambda bank: bank.model):
        print(model)
        for bank in some:
            say("  " + "  ".join(map(str.ljust, (bank.width, bank.format), widths)) + f"  {bank.kind}: {bank.site}")
            refused = "" if bank.readable == "yes" else f" is not readable yet ({bank.readable.removeprefix('no: ')})"
            say(f"      {bank.load}{refused}")
    print()
    say("Other layers and widths have addresses like these; --json has where and when each row was read.")

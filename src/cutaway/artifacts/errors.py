"""Errors a user can act on."""


class CutawayError(Exception):
    """What was asked cannot be done, and the message says in one sentence why and what to do instead.

    The command line prints the message and exits with code 2; no traceback is shown. It is one line, also where it
    quotes what is not (a column's name in a damaged table, say).
    """

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())

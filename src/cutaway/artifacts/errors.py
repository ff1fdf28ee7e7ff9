"""Errors that a user can act on. All are `CutawayError`, and their sentence says what to do."""


class CutawayError(Exception):
    """What was asked cannot be done, and the message says in one sentence why and what to do instead.

    The command line prints the message and exits with code 2; no traceback is shown. It is one line, also where it
    quotes what is not (a column's name in a damaged table, say).
    """

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())


class NoSuchSite(CutawayError):
    """The model has no site of that name; the message says why, or which names are near."""


class Misaligned(CutawayError):
    """Two prompts, or two tensors, that must match token by token do not."""


class TooLarge(CutawayError):
    """It would take more memory or more runs than the limit; the message says how much, and what takes less."""


class BadFile(CutawayError):
    """A file is damaged, of another format, or would be replaced by something of another kind."""


class CannotDoTask(CutawayError):
    """The model does not do the task that it is to be explained on."""


class NotSupported(CutawayError):
    """The model, site or option is known and not supported; the message says what is."""


class MissingExtra(NotSupported):
    """An optional dependency is not installed; the message says which `pip install` brings it."""


class MissingControls(CutawayError):
    """An effect was to be shown without anything to compare it with."""

"""The command `cutaway`: parses, calls, and turns what goes wrong into one sentence and an exit code.

    0    done
    1    a check failed (`cutaway check`)
    2    bad input: one sentence on stderr says what and the way out
    130  Ctrl-C; the same command resumes where it can, else it starts again

Nothing here, nor at the top of a command's module, imports torch or transformers: help must be instant.
"""

import errno
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Any

from cyclopts import App, CycloptsError, Parameter
from cyclopts.exceptions import UnknownCommandError

from cutaway import __version__
from cutaway.artifacts.errors import CutawayError
from cutaway.cli.asked import asked
from cutaway.cli.causal.circuit import circuit
from cutaway.cli.causal.patch import patch
from cutaway.cli.causal.tasks import tasks
from cutaway.cli.causal.trace import trace
from cutaway.cli.dictionaries.dictionary import app as dictionary
from cutaway.cli.dictionaries.harvest import harvest
from cutaway.cli.dictionaries.train import train
from cutaway.cli.help import MODELS, lay_out
from cutaway.cli.live import open_page
from cutaway.cli.model.check import check
from cutaway.cli.model.sites import sites
from cutaway.cli.observe.attribute import attribute
from cutaway.cli.observe.heads import heads
from cutaway.cli.observe.lens import lens
from cutaway.cli.observe.probe import probe
from cutaway.cli.observe.saliency import saliency
from cutaway.cli.subjects import app as subjects
from cutaway.cli.tour import tour

# what the operating system says of a path: too long, not readable, not there, in a circle
_OF_A_PATH = {errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}

app = App(
    name="cutaway",
    help="Look inside language models: see, find causes, name features, change.",
    version=__version__,
    help_format="plaintext",
    result_action="return_value",
    default_parameter=Parameter(negative=()),  # no --no-..., no --empty-...
    suppress_keyboard_interrupt=False,
    help_epilogue=MODELS,
)
for command in (
    tour,
    check,
    sites,
    lens,
    heads,
    attribute,
    saliency,
    probe,
    tasks,
    patch,
    trace,
    circuit,
    subjects,
    harvest,
    train,
    dictionary,
):
    app.command(command)
app.command(open_page, name="open")
lay_out(app)
app.register_install_completion_command(
    add_to_startup=False, help="Write the completion of commands and options for your shell, and say how to turn it on."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: this process's) and return its exit code."""
    silence_libraries()
    interrupted: list[int] = []
    restore = _note_interrupts(interrupted)
    # waiting threads that spin starve each other when other programs use the cores too (ten times slower and more)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a sign is no reason to stop
    try:
        if _no_working_directory():
            return _fail("the working directory is gone; change into one that is there")
        code = execute(arguments)
        if sys.stdout is not None:  # it is None when the caller has closed it
            sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except UnknownCommandError as error:
        return _fail(_with_all_commands(error))
    except CycloptsError as error:
        return _fail(f"{error} (see cutaway --help)")
    except CutawayError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        _drop_stdout()  # the reader went away (`| head`)
        return 0
    except Exception as error:
        if interrupted:  # libraries turn an interrupted import into errors of their own
            return _interrupted()
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            _drop_stdout()
            return _fail("the output could not be written: the disk is full")
        if isinstance(error, OSError) and error.errno in _OF_A_PATH and error.filename is not None:
            return _fail(f"{_shortened(error.filename)}: {error.strerror}; name another path, or change its rights")
        if _out_of_memory(error):
            return _fail("there is not enough memory for this; ask for less at once, or take a smaller model")
        raise
    finally:
        if restore is not None:
            signal.signal(signal.SIGINT, restore)


def execute(arguments: Sequence[str] | None) -> object:
    """Parse and run; what the command gives back."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    command, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    path, apps, _ = app.parse_commands(words)
    if command is not apps[-1].default_command:  # help, version
        return command(*bound.args, **bound.kwargs)
    with asked(path, apps[-1], bound):
        return command(*bound.args, **bound.kwargs)


def _with_all_commands(error: UnknownCommandError) -> str:
    """What is said of an unknown command, with every command there is in place of the first eight."""
    said = str(error).split(" Available commands:")[0]
    known = [name for name in error.app or app if not name.startswith("-") and (error.app or app)[name].show]
    return f"{said} Commands: {', '.join(known)}. (see cutaway --help)"


def _no_working_directory() -> bool:
    try:
        os.getcwd()
    except OSError:
        return True
    return False


def _shortened(path: object) -> str:
    text = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else str(path)
    return text if len(text) < 200 else text[:100] + "…"


def _out_of_memory(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from cutaway.model.sweep.memory import out_of_memory

    return out_of_memory(error)


def _note_interrupts(noted: list[int]) -> Any:
    """Raise KeyboardInterrupt on Ctrl-C, as ever, and note that it came. Returns the handler to set back, if any."""
    if threading.current_thread() is not threading.main_thread():
        return None
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, or the caller's own
        return None

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        if any(_half_imported(name) for name in ("torch", "numpy")):  # whose C++ parts abort on a Python exception
            code = _interrupted()
            sys.stderr.flush()
            os._exit(code)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    return before


def _half_imported(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def _interrupted() -> int:
    print("cutaway: interrupted; the same command resumes, or starts again", file=sys.stderr)
    return 130


def _drop_stdout() -> None:
    """Point stdout elsewhere, or the interpreter complains when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def silence_libraries() -> None:
    """Keep transformers, tokenizers and the hub client from writing between our lines; the user's settings win."""
    for name, value in {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_VERBOSITY": "error",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _fail(message: str) -> int:
    print(f"cutaway: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

from .edits.edits import Edit as Edit
from .edits.edits import Receipt as Receipt
from .edits.edits import add as add
from .edits.edits import clamp as clamp
from .edits.edits import clamp_latent as clamp_latent
from .edits.edits import function as function
from .edits.edits import mean as mean
from .edits.edits import noise as noise
from .edits.edits import patch as patch
from .edits.edits import project_out as project_out
from .edits.edits import resample as resample
from .edits.edits import scale as scale
from .edits.edits import set as set
from .edits.edits import zero as zero
from .edits.files import load_edits as load_edits
from .edits.files import save_edits as save_edits
from .edits.positions import at_token as at_token
from .edits.values import register_edit_function as register_edit_function
from .forward.files import load_run as load_run
from .forward.run import Generation as Generation
from .forward.run import Gradients as Gradients
from .forward.run import Run as Run
from .generation.decoding import GenerationStep as GenerationStep
from .generation.settings import Decoding as Decoding
from .generation.streaming import GenerationStream as GenerationStream
from .language_model import LanguageModel as LanguageModel
from .language_model import attach as attach
from .language_model import load as load
from .naming import single_token as single_token
from .own.file import load_module as load_module
from .own.module import Description as Description
from .own.weights import from_weights as from_weights
from .selftest.result import SelfTest as SelfTest
from .sites import Site as Site
from .sites import SiteKind as SiteKind
from .sites import SiteTable as SiteTable
from .sweep.results import Sweep as Sweep
from .sweep.results import SweepInterrupted as SweepInterrupted
from .tokens import Tokens as Tokens

__all__ = [
    "Decoding",
    "Description",
    "Edit",
    "Generation",
    "GenerationStep",
    "GenerationStream",
    "Gradients",
    "LanguageModel",
    "Receipt",
    "Run",
    "SelfTest",
    "Site",
    "SiteKind",
    "SiteTable",
    "Sweep",
    "SweepInterrupted",
    "Tokens",
    "add",
    "at_token",
    "attach",
    "clamp",
    "clamp_latent",
    "from_weights",
    "function",
    "load",
    "load_edits",
    "load_module",
    "load_run",
    "mean",
    "noise",
    "patch",
    "project_out",
    "register_edit_function",
    "resample",
    "save_edits",
    "scale",
    "set",
    "single_token",
    "zero",
]

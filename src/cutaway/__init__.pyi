__version__: str

from . import causal as causal
from . import data as data
from . import dictionaries as dictionaries
from . import features as features
from . import model as model
from . import observe as observe
from . import serve as serve
from . import steering as steering
from . import subjects as subjects
from . import tour as tour
from .artifacts.errors import BadFile as BadFile
from .artifacts.errors import CannotDoTask as CannotDoTask
from .artifacts.errors import CutawayError as CutawayError
from .artifacts.errors import Misaligned as Misaligned
from .artifacts.errors import MissingControls as MissingControls
from .artifacts.errors import MissingExtra as MissingExtra
from .artifacts.errors import NoSuchSite as NoSuchSite
from .artifacts.errors import NotSupported as NotSupported
from .artifacts.errors import TooLarge as TooLarge
from .model.edits.edits import Edit as Edit
from .model.edits.edits import add as add
from .model.edits.edits import clamp as clamp
from .model.edits.edits import clamp_latent as clamp_latent
from .model.edits.edits import function as function
from .model.edits.edits import mean as mean
from .model.edits.edits import noise as noise
from .model.edits.edits import patch as patch
from .model.edits.edits import project_out as project_out
from .model.edits.edits import resample as resample
from .model.edits.edits import scale as scale
from .model.edits.edits import set as set
from .model.edits.edits import zero as zero
from .model.edits.files import load_edits as load_edits
from .model.edits.files import save_edits as save_edits
from .model.edits.positions import at_token as at_token
from .model.edits.values import register_edit_function as register_edit_function
from .model.forward.files import load_run as load_run
from .model.forward.run import Run as Run
from .model.generation.settings import Decoding as Decoding
from .model.language_model import LanguageModel as LanguageModel
from .model.language_model import attach as attach
from .model.language_model import load as load
from .model.own.module import Description as Description
from .model.own.weights import from_weights as from_weights
from .model.tokens import Tokens as Tokens

__all__ = [
    "BadFile",
    "CannotDoTask",
    "CutawayError",
    "Decoding",
    "Description",
    "Edit",
    "LanguageModel",
    "Misaligned",
    "MissingControls",
    "MissingExtra",
    "NoSuchSite",
    "NotSupported",
    "Run",
    "Tokens",
    "TooLarge",
    "add",
    "at_token",
    "attach",
    "causal",
    "clamp",
    "clamp_latent",
    "data",
    "dictionaries",
    "features",
    "from_weights",
    "function",
    "load",
    "load_edits",
    "load_run",
    "mean",
    "model",
    "noise",
    "observe",
    "patch",
    "project_out",
    "register_edit_function",
    "resample",
    "save_edits",
    "scale",
    "serve",
    "set",
    "steering",
    "subjects",
    "tour",
    "zero",
]

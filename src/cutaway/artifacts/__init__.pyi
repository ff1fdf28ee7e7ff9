from .command import current_command as current_command
from .command import recording as recording
from .errors import BadFile as BadFile
from .errors import CannotDoTask as CannotDoTask
from .errors import CutawayError as CutawayError
from .errors import Misaligned as Misaligned
from .errors import MissingControls as MissingControls
from .errors import MissingExtra as MissingExtra
from .errors import NoSuchSite as NoSuchSite
from .errors import NotSupported as NotSupported
from .errors import TooLarge as TooLarge
from .manifest import Manifest as Manifest
from .manifest import ModelIdentity as ModelIdentity
from .ranking import auroc as auroc
from .results import Choices as Choices
from .results import Control as Control
from .results import Effect as Effect
from .results import interval_text as interval_text
from .run_folder import RunFolder as RunFolder
from .statistics import bootstrap_interval as bootstrap_interval
from .statistics import false_discovery as false_discovery
from .statistics import mean_intervals as mean_intervals
from .statistics import median_interval as median_interval
from .statistics import paired_t_p as paired_t_p
from .statistics import ratio_intervals as ratio_intervals
from .statistics import sign_flip_p as sign_flip_p
from .statistics import wilson_interval as wilson_interval

__all__ = [
    "BadFile",
    "CannotDoTask",
    "Choices",
    "Control",
    "CutawayError",
    "Effect",
    "Manifest",
    "Misaligned",
    "MissingControls",
    "MissingExtra",
    "ModelIdentity",
    "NoSuchSite",
    "NotSupported",
    "RunFolder",
    "TooLarge",
    "auroc",
    "bootstrap_interval",
    "current_command",
    "false_discovery",
    "interval_text",
    "mean_intervals",
    "median_interval",
    "paired_t_p",
    "ratio_intervals",
    "recording",
    "sign_flip_p",
    "wilson_interval",
]

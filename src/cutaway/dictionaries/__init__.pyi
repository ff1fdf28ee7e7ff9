from .dictionary import Dictionary as Dictionary
from .dictionary import Port as Port
from .dictionary import random_dictionary as random_dictionary
from .evaluation.absorption import Absorption as Absorption
from .evaluation.absorption import absorption as absorption
from .evaluation.crosscoders import Sides as Sides
from .evaluation.crosscoders import compare_sides as compare_sides
from .evaluation.evaluate import Evaluation as Evaluation
from .evaluation.evaluate import evaluate as evaluate
from .evaluation.frontier import Frontier as Frontier
from .evaluation.frontier import Point as Point
from .evaluation.frontier import frontier as frontier
from .evaluation.judge import Judgement as Judgement
from .evaluation.judge import by_setting as by_setting
from .evaluation.judge import judge as judge
from .evaluation.labels import counted_ids as counted_ids
from .evaluation.labels import first_letters as first_letters
from .evaluation.labels import states_of_cities as states_of_cities
from .evaluation.latents import LatentStatistics as LatentStatistics
from .evaluation.probing import Probing as Probing
from .evaluation.probing import sparse_probing as sparse_probing
from .evaluation.recovery import EASY as EASY
from .evaluation.recovery import HARD as HARD
from .evaluation.recovery import TOYS as TOYS
from .evaluation.recovery import Recovery as Recovery
from .evaluation.recovery import RecoveryStudy as RecoveryStudy
from .evaluation.recovery import recover as recover
from .evaluation.recovery import recovery_study as recovery_study
from .evaluation.stability import Stability as Stability
from .evaluation.stability import stability as stability
from .formats.files import at_site as at_site
from .formats.files import load as load
from .formats.files import load_all as load_all
from .formats.files import save as save
from .formats.files import save_all as save_all
from .formats.report import Inspection as Inspection
from .formats.report import inspect as inspect
from .latent import Latent as Latent
from .ports import PortValues as PortValues
from .ports import harvest_ports as harvest_ports
from .ports import read_texts as read_texts
from .selectors import BatchTopK as BatchTopK
from .selectors import Gated as Gated
from .selectors import JumpReLU as JumpReLU
from .selectors import ReLU as ReLU
from .selectors import TopK as TopK
from .training.api import Training as Training
from .training.api import prepare as prepare
from .training.api import train as train
from .training.calibrate import calibrate as calibrate
from .training.config import Resample as Resample
from .training.config import TrainConfig as TrainConfig
from .training.end_to_end import train_end_to_end as train_end_to_end
from .training.estimate import DictionaryEstimate as DictionaryEstimate
from .training.estimate import Estimate as Estimate
from .training.estimate import estimate as estimate
from .training.from_model import train_on_model as train_on_model
from .training.jobs import Job as Job
from .training.jobs import Trained as Trained
from .training.jobs import train_jobs as train_jobs
from .training.presets import PRESETS as PRESETS
from .training.presets import Preset as Preset
from .training.presets import preset as preset
from .training.recipe import Plan as Plan
from .training.recipe import Recipe as Recipe
from .training.rules import BatchTopKRule as BatchTopKRule
from .training.rules import GatedRule as GatedRule
from .training.rules import JumpReLURule as JumpReLURule
from .training.rules import ReLURule as ReLURule
from .training.rules import TopKRule as TopKRule
from .training.sources import LiveRows as LiveRows
from .training.sources import StoreSource as StoreSource
from .training.sources import Tensors as Tensors
from .training.terms import L0 as L0
from .training.terms import AuxK as AuxK
from .training.terms import EndToEnd as EndToEnd
from .training.terms import GatedAuxiliary as GatedAuxiliary
from .training.terms import Lp as Lp
from .training.terms import Matryoshka as Matryoshka
from .training.terms import MultiTopK as MultiTopK
from .training.terms import PreActivation as PreActivation
from .training.terms import QuadraticL0 as QuadraticL0
from .training.terms import Reconstruction as Reconstruction
from .training.terms import Tanh as Tanh

__all__ = [
    "EASY",
    "HARD",
    "L0",
    "PRESETS",
    "TOYS",
    "Absorption",
    "AuxK",
    "BatchTopK",
    "BatchTopKRule",
    "Dictionary",
    "DictionaryEstimate",
    "EndToEnd",
    "Estimate",
    "Evaluation",
    "Frontier",
    "Gated",
    "GatedAuxiliary",
    "GatedRule",
    "Inspection",
    "Job",
    "Judgement",
    "JumpReLU",
    "JumpReLURule",
    "Latent",
    "LatentStatistics",
    "LiveRows",
    "Lp",
    "Matryoshka",
    "MultiTopK",
    "Plan",
    "Point",
    "Port",
    "PortValues",
    "PreActivation",
    "Preset",
    "Probing",
    "QuadraticL0",
    "ReLU",
    "ReLURule",
    "Recipe",
    "Reconstruction",
    "Recovery",
    "RecoveryStudy",
    "Resample",
    "Sides",
    "Stability",
    "StoreSource",
    "Tanh",
    "Tensors",
    "TopK",
    "TopKRule",
    "TrainConfig",
    "Trained",
    "Training",
    "absorption",
    "at_site",
    "by_setting",
    "calibrate",
    "compare_sides",
    "counted_ids",
    "estimate",
    "evaluate",
    "first_letters",
    "frontier",
    "harvest_ports",
    "inspect",
    "judge",
    "load",
    "load_all",
    "prepare",
    "preset",
    "random_dictionary",
    "read_texts",
    "recover",
    "recovery_study",
    "save",
    "save_all",
    "sparse_probing",
    "stability",
    "states_of_cities",
    "train",
    "train_end_to_end",
    "train_jobs",
    "train_on_model",
]

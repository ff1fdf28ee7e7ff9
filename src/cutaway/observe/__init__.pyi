from .attribution.ablation import AblatedPart as AblatedPart
from .attribution.ablation import PartAblations as PartAblations
from .attribution.ablation import ablate_parts as ablate_parts
from .attribution.answers import model_answers as model_answers
from .attribution.attribution import attribute as attribute
from .attribution.results import Attribution as Attribution
from .attribution.results import Part as Part
from .heads.ablation import HeadEffects as HeadEffects
from .heads.ablation import ablate_each_head as ablate_each_head
from .heads.ablation import text_loss as text_loss
from .heads.attention_view import AttentionView as AttentionView
from .heads.attention_view import attention_view as attention_view
from .heads.circuit_results import CircuitTokens as CircuitTokens
from .heads.circuit_results import Composition as Composition
from .heads.circuit_results import CopyingScores as CopyingScores
from .heads.circuit_results import TokenPair as TokenPair
from .heads.circuits import Factored as Factored
from .heads.circuits import circuit_tokens as circuit_tokens
from .heads.circuits import composition as composition
from .heads.circuits import copying_scores as copying_scores
from .heads.circuits import ov_circuit as ov_circuit
from .heads.circuits import qk_circuit as qk_circuit
from .heads.circuits import qk_ignores as qk_ignores
from .heads.kinds import KindScores as KindScores
from .heads.labels import HeadTable as HeadTable
from .heads.labels import LabelledHead as LabelledHead
from .heads.report import HeadReport as HeadReport
from .heads.report import HeadRow as HeadRow
from .heads.report import HeadScores as HeadScores
from .heads.report import ablate_heads as ablate_heads
from .heads.report import head_report as head_report
from .heads.report import head_scores as head_scores
from .heads.report import repeated_tokens as repeated_tokens
from .heads.report import second_half_loss as second_half_loss
from .heads.scores import repeated_scores as repeated_scores
from .heads.table import head_table as head_table
from .heads.table import random_loss as random_loss
from .heads.table import repetition as repetition
from .heads.targets import retrieval_scores as retrieval_scores
from .heads.text import text_scores as text_scores
from .lens.evaluation import LensEvaluation as LensEvaluation
from .lens.evaluation import evaluate_lens as evaluate_lens
from .lens.files import load_tuned_lens as load_tuned_lens
from .lens.files import save_tuned_lens as save_tuned_lens
from .lens.logit_lens import LogitLens as LogitLens
from .lens.logit_lens import logit_lens as logit_lens
from .lens.tuned_lens import TunedLens as TunedLens
from .lens.tuned_lens import TunedLensConfig as TunedLensConfig
from .lens.tuned_lens import train_tuned_lens as train_tuned_lens
from .probes.data import ProbeData as ProbeData
from .probes.data import probe_data as probe_data
from .probes.data import read_site as read_site
from .probes.probe import Probe as Probe
from .probes.probe import load_probe as load_probe
from .probes.results import ProbeSweep as ProbeSweep
from .probes.results import ProbeUse as ProbeUse
from .probes.results import Reliability as Reliability
from .probes.results import SiteProbe as SiteProbe
from .probes.results import UseAction as UseAction
from .probes.sweep import probe_sweep as probe_sweep
from .probes.usage import Answers as Answers
from .probes.usage import answer_tokens as answer_tokens
from .probes.usage import use_in_folds as use_in_folds
from .probes.usage import use_probe as use_probe
from .random_weights import untrained as untrained
from .saliency_maps.methods import Question as Question
from .saliency_maps.methods import TokenAttribution as TokenAttribution
from .saliency_maps.methods import gradient_x_input as gradient_x_input
from .saliency_maps.methods import integrated_gradients as integrated_gradients
from .saliency_maps.methods import occlusion as occlusion
from .saliency_maps.methods import question as question
from .saliency_maps.methods import saliency_map as saliency_map
from .saliency_maps.report import MethodReport as MethodReport
from .saliency_maps.report import SaliencyChecks as SaliencyChecks
from .saliency_maps.report import SaliencyReport as SaliencyReport
from .saliency_maps.report import Stage as Stage
from .saliency_maps.report import saliency as saliency

__all__ = [
    "AblatedPart",
    "Answers",
    "AttentionView",
    "Attribution",
    "CircuitTokens",
    "Composition",
    "CopyingScores",
    "Factored",
    "HeadEffects",
    "HeadReport",
    "HeadRow",
    "HeadScores",
    "HeadTable",
    "KindScores",
    "LabelledHead",
    "LensEvaluation",
    "LogitLens",
    "MethodReport",
    "Part",
    "PartAblations",
    "Probe",
    "ProbeData",
    "ProbeSweep",
    "ProbeUse",
    "Question",
    "Reliability",
    "SaliencyChecks",
    "SaliencyReport",
    "SiteProbe",
    "Stage",
    "TokenAttribution",
    "TokenPair",
    "TunedLens",
    "TunedLensConfig",
    "UseAction",
    "ablate_each_head",
    "ablate_heads",
    "ablate_parts",
    "answer_tokens",
    "attention_view",
    "attribute",
    "circuit_tokens",
    "composition",
    "copying_scores",
    "evaluate_lens",
    "gradient_x_input",
    "head_report",
    "head_scores",
    "head_table",
    "integrated_gradients",
    "load_probe",
    "load_tuned_lens",
    "logit_lens",
    "model_answers",
    "occlusion",
    "ov_circuit",
    "probe_data",
    "probe_sweep",
    "qk_circuit",
    "qk_ignores",
    "question",
    "random_loss",
    "read_site",
    "repeated_scores",
    "repeated_tokens",
    "repetition",
    "retrieval_scores",
    "saliency",
    "saliency_map",
    "save_tuned_lens",
    "second_half_loss",
    "text_loss",
    "text_scores",
    "train_tuned_lens",
    "untrained",
    "use_in_folds",
    "use_probe",
]

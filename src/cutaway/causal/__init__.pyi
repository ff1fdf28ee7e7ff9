from .ablations import ABLATIONS as ABLATIONS
from .ablations import Ablation as Ablation
from .ablations import replacement_run as replacement_run
from .abstraction.causal_model import CausalModel as CausalModel
from .abstraction.causal_model import Example as Example
from .abstraction.causal_model import Swap as Swap
from .abstraction.causal_model import Variable as Variable
from .abstraction.interchange import interchange as interchange
from .abstraction.interchange import interchange_grid as interchange_grid
from .abstraction.outcomes import Alignment as Alignment
from .abstraction.outcomes import Interchanged as Interchanged
from .abstraction.outcomes import InterchangeGrid as InterchangeGrid
from .abstraction.outcomes import Place as Place
from .accuracy import TaskAccuracy as TaskAccuracy
from .accuracy import task_accuracy as task_accuracy
from .attribution.atp_star import MissedBound as MissedBound
from .attribution.atp_star import missed_bound as missed_bound
from .attribution.attribution_patching import GradientOptions as GradientOptions
from .attribution.attribution_patching import attribution_patching as attribution_patching
from .attribution.feature_circuits import FeatureCircuit as FeatureCircuit
from .attribution.feature_circuits import FeatureEdge as FeatureEdge
from .attribution.feature_circuits import FeatureNode as FeatureNode
from .attribution.feature_circuits import Thresholds as Thresholds
from .attribution.feature_circuits import feature_circuit as feature_circuit
from .attribution.feature_circuits import strongest_nodes as strongest_nodes
from .attribution.feature_evaluation import feature_faithfulness as feature_faithfulness
from .attribution.latents import latent_attribution as latent_attribution
from .attribution.relp import relp_rules as relp_rules
from .attribution.scores import Agreement as Agreement
from .attribution.scores import Node as Node
from .attribution.scores import NodeScores as NodeScores
from .circuits.baselines import random_circuits as random_circuits
from .circuits.circuit import Circuit as Circuit
from .circuits.completeness import CircuitSelfRepair as CircuitSelfRepair
from .circuits.completeness import Completeness as Completeness
from .circuits.completeness import Minimality as Minimality
from .circuits.completeness import completeness as completeness
from .circuits.completeness import minimality as minimality
from .circuits.discovery import Search as Search
from .circuits.discovery import SearchPairs as SearchPairs
from .circuits.discovery import circuit_runner as circuit_runner
from .circuits.discovery import discover as discover
from .circuits.discovery import evaluate_circuit as evaluate_circuit
from .circuits.discovery import split_pairs as split_pairs
from .circuits.edge_scores import EdgeScores as EdgeScores
from .circuits.edge_scores import Scorer as Scorer
from .circuits.evidence import Evaluation as Evaluation
from .circuits.evidence import Evidence as Evidence
from .circuits.faithfulness import Faithfulness as Faithfulness
from .circuits.faithfulness import SizeCurve as SizeCurve
from .circuits.gradient_scores import GradientAt as GradientAt
from .circuits.gradient_scores import attribute_edges as attribute_edges
from .circuits.gradient_scores import clean_corrupted as clean_corrupted
from .circuits.gradient_scores import eap as eap
from .circuits.gradient_scores import eap_ig as eap_ig
from .circuits.gradient_scores import position_columns as position_columns
from .circuits.gradient_scores import relp as relp
from .circuits.runs import CircuitRuns as CircuitRuns
from .circuits.runs import run_circuits as run_circuits
from .circuits.scorers import SCORERS as SCORERS
from .circuits.scorers import exact as exact
from .circuits.scorers import magnitude as magnitude
from .circuits.stability import Stability as Stability
from .edge_graph import EdgeGraph as EdgeGraph
from .metrics import METRICS as METRICS
from .metrics import Metric as Metric
from .metrics import PatchDirection as PatchDirection
from .metrics import Targets as Targets
from .metrics import kl_from_clean as kl_from_clean
from .metrics import logit_difference as logit_difference
from .metrics import nll as nll
from .metrics import probability as probability
from .metrics import probability_difference as probability_difference
from .metrics import rank as rank
from .metrics import ratio_of_means as ratio_of_means
from .metrics import recovery as recovery
from .metrics import targets_of as targets_of
from .patching.cells import PatchCell as PatchCell
from .patching.grid import PatchedCell as PatchedCell
from .patching.grid import PatchGrid as PatchGrid
from .patching.patch import Parts as Parts
from .patching.patch import PatchOptions as PatchOptions
from .patching.patch import patch_cell as patch_cell
from .patching.patch import patch_grid as patch_grid
from .patching.self_repair import SelfRepair as SelfRepair
from .patching.self_repair import self_repair as self_repair
from .paths.grid import PathGrid as PathGrid
from .paths.path_patching import all_senders as all_senders
from .paths.path_patching import path_patch as path_patch
from .task_results import TaskResult as TaskResult
from .task_results import TaskResults as TaskResults
from .task_results import try_task as try_task
from .task_results import try_tasks as try_tasks
from .tracing.grid import CausalTrace as CausalTrace
from .tracing.grid import TraceKind as TraceKind
from .tracing.prompts import FactPrompt as FactPrompt
from .tracing.trace import causal_trace as causal_trace

__all__ = [
    "ABLATIONS",
    "METRICS",
    "SCORERS",
    "Ablation",
    "Agreement",
    "Alignment",
    "CausalModel",
    "CausalTrace",
    "Circuit",
    "CircuitRuns",
    "CircuitSelfRepair",
    "Completeness",
    "EdgeGraph",
    "EdgeScores",
    "Evaluation",
    "Evidence",
    "Example",
    "FactPrompt",
    "Faithfulness",
    "FeatureCircuit",
    "FeatureEdge",
    "FeatureNode",
    "GradientAt",
    "GradientOptions",
    "InterchangeGrid",
    "Interchanged",
    "Metric",
    "Minimality",
    "MissedBound",
    "Node",
    "NodeScores",
    "Parts",
    "PatchCell",
    "PatchDirection",
    "PatchGrid",
    "PatchOptions",
    "PatchedCell",
    "PathGrid",
    "Place",
    "Scorer",
    "Search",
    "SearchPairs",
    "SelfRepair",
    "SizeCurve",
    "Stability",
    "Swap",
    "Targets",
    "TaskAccuracy",
    "TaskResult",
    "TaskResults",
    "Thresholds",
    "TraceKind",
    "Variable",
    "all_senders",
    "attribute_edges",
    "attribution_patching",
    "causal_trace",
    "circuit_runner",
    "clean_corrupted",
    "completeness",
    "discover",
    "eap",
    "eap_ig",
    "evaluate_circuit",
    "exact",
    "feature_circuit",
    "feature_faithfulness",
    "interchange",
    "interchange_grid",
    "kl_from_clean",
    "latent_attribution",
    "logit_difference",
    "magnitude",
    "minimality",
    "missed_bound",
    "nll",
    "patch_cell",
    "patch_grid",
    "path_patch",
    "position_columns",
    "probability",
    "probability_difference",
    "random_circuits",
    "rank",
    "ratio_of_means",
    "recovery",
    "relp",
    "relp_rules",
    "replacement_run",
    "run_circuits",
    "self_repair",
    "split_pairs",
    "strongest_nodes",
    "targets_of",
    "task_accuracy",
    "try_task",
    "try_tasks",
]

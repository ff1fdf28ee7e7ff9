from .atlas.shipped import atlas_folder as atlas_folder
from .atlas.text import library_text as library_text
from .atlas.text import world_text as world_text
from .superposition.ceiling import Ceiling as Ceiling
from .superposition.ceiling import linear_ceiling as linear_ceiling
from .superposition.generator import FeatureGenerator as FeatureGenerator
from .superposition.generator import FeatureWorld as FeatureWorld
from .superposition.geometry import POLYTOPES as POLYTOPES
from .superposition.geometry import dimensionality as dimensionality
from .superposition.geometry import dimensions_per_feature as dimensions_per_feature
from .superposition.geometry import feature_norms as feature_norms
from .superposition.geometry import interference as interference
from .superposition.geometry import nearest_polytope as nearest_polytope
from .superposition.phase import PhaseDiagram as PhaseDiagram
from .superposition.phase import expected_loss as expected_loss
from .superposition.phase import optimal_diagram as optimal_diagram
from .superposition.phase import trained_diagram as trained_diagram
from .superposition.scores import COLUMNS as COLUMNS
from .superposition.scores import Scores as Scores
from .superposition.scores import random_code as random_code
from .superposition.scores import score_dictionary as score_dictionary
from .superposition.scores import score_rows as score_rows
from .superposition.study import ToyStudy as ToyStudy
from .superposition.study import toy_study as toy_study
from .superposition.toy_models import ToyModels as ToyModels
from .superposition.toy_models import ToyTraining as ToyTraining
from .superposition.toy_models import train_toys as train_toys
from .world.corpus import PARTS as PARTS
from .world.corpus import WORLD_VERSION as WORLD_VERSION
from .world.corpus import documents as documents
from .world.corpus import samples as samples
from .world.facts import BOOKS as BOOKS
from .world.facts import CITIES as CITIES
from .world.facts import COUNTRIES as COUNTRIES
from .world.facts import LANDMARKS as LANDMARKS
from .world.facts import STATES as STATES
from .world.items.items import Item as Item
from .world.items.items import ItemSet as ItemSet
from .world.items.pairs import WORLD_TASKS as WORLD_TASKS
from .world.items.sets import item_sets as item_sets
from .world.statements.relations import relation as relation

__all__ = [
    "BOOKS",
    "CITIES",
    "COLUMNS",
    "COUNTRIES",
    "LANDMARKS",
    "PARTS",
    "POLYTOPES",
    "STATES",
    "WORLD_TASKS",
    "WORLD_VERSION",
    "Ceiling",
    "FeatureGenerator",
    "FeatureWorld",
    "Item",
    "ItemSet",
    "PhaseDiagram",
    "Scores",
    "ToyModels",
    "ToyStudy",
    "ToyTraining",
    "atlas_folder",
    "dimensionality",
    "dimensions_per_feature",
    "documents",
    "expected_loss",
    "feature_norms",
    "interference",
    "item_sets",
    "library_text",
    "linear_ceiling",
    "nearest_polytope",
    "optimal_diagram",
    "random_code",
    "relation",
    "samples",
    "score_dictionary",
    "score_rows",
    "toy_study",
    "train_toys",
    "trained_diagram",
    "world_text",
]

from .activations import LatentActivations as LatentActivations
from .activations import latent_activations as latent_activations
from .concepts import ConceptMatch as ConceptMatch
from .concepts import ConceptMatches as ConceptMatches
from .concepts import match_concepts as match_concepts
from .concepts import mentions as mentions
from .effects import LogitEffects as LogitEffects
from .effects import direct_logits as direct_logits
from .effects import logit_effects as logit_effects
from .examples import Example as Example
from .examples import FeatureExamples as FeatureExamples
from .examples import LatentExamples as LatentExamples
from .examples import Windows as Windows
from .examples import top_examples as top_examples
from .summary import TokenSummaries as TokenSummaries
from .summary import TokenSummary as TokenSummary
from .summary import token_summary as token_summary

__all__ = [
    "ConceptMatch",
    "ConceptMatches",
    "Example",
    "FeatureExamples",
    "LatentActivations",
    "LatentExamples",
    "LogitEffects",
    "TokenSummaries",
    "TokenSummary",
    "Windows",
    "direct_logits",
    "latent_activations",
    "logit_effects",
    "match_concepts",
    "mentions",
    "token_summary",
    "top_examples",
]

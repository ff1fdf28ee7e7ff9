from .controls import MatchedControl as MatchedControl
from .controls import matched_controls as matched_controls
from .controls import matched_scale as matched_scale
from .directions import INSTRUCTION as INSTRUCTION
from .directions import Direction as Direction
from .directions import Directions as Directions
from .directions import ablate_direction as ablate_direction
from .directions import add_direction as add_direction
from .directions import clamp_to_negative as clamp_to_negative
from .directions import difference_of_means as difference_of_means
from .directions import direction_between as direction_between
from .directions import read_positions as read_positions
from .evaluation import SteeringResult as SteeringResult
from .evaluation import evaluate_steering as evaluate_steering
from .latents import Concept as Concept
from .latents import Dose as Dose
from .latents import Doses as Doses
from .latents import LatentSteering as LatentSteering
from .latents import SimilarLatents as SimilarLatents
from .latents import similar_latents as similar_latents
from .latents import steer_latent as steer_latent
from .replies import Judging as Judging
from .replies import Replies as Replies
from .replies import judge_refusal as judge_refusal
from .replies import judged as judged
from .selection import Candidate as Candidate
from .selection import ReplyTokens as ReplyTokens
from .selection import Selection as Selection
from .selection import reply_tokens as reply_tokens
from .selection import select_direction as select_direction
from .side_effects import SideEffects as SideEffects
from .side_effects import side_effects_of as side_effects_of
from .side_effects import side_effects_of_each as side_effects_of_each

__all__ = [
    "INSTRUCTION",
    "Candidate",
    "Concept",
    "Direction",
    "Directions",
    "Dose",
    "Doses",
    "Judging",
    "LatentSteering",
    "MatchedControl",
    "Replies",
    "ReplyTokens",
    "Selection",
    "SideEffects",
    "SimilarLatents",
    "SteeringResult",
    "ablate_direction",
    "add_direction",
    "clamp_to_negative",
    "difference_of_means",
    "direction_between",
    "evaluate_steering",
    "judge_refusal",
    "judged",
    "matched_controls",
    "matched_scale",
    "read_positions",
    "reply_tokens",
    "select_direction",
    "side_effects_of",
    "side_effects_of_each",
    "similar_latents",
    "steer_latent",
]

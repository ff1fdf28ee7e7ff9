from .corpus.corpus import Corpus as Corpus
from .corpus.corpus import RowSplit as RowSplit
from .corpus.corpus import read_corpus as read_corpus
from .corpus.corpus import split_rows as split_rows
from .corpus.corpus import token_rows as token_rows
from .corpus.documents import Documents as Documents
from .corpus.documents import documents_of as documents_of
from .harvesting.activations import read_activations as read_activations
from .harvesting.harvest import harvest as harvest
from .harvesting.settings import Rules as Rules
from .harvesting.settings import Storage as Storage
from .harvesting.store import Activations as Activations
from .harvesting.store import Store as Store
from .labelled.rows import read_rows as read_rows
from .pairs import AlignedPairs as AlignedPairs
from .pairs import PromptPair as PromptPair
from .pairs import aligned as aligned
from .tasks.files import read_pairs as read_pairs
from .tasks.files import task_from_file as task_from_file
from .tasks.files import write_pairs as write_pairs
from .tasks.registry import all_tasks as all_tasks
from .tasks.registry import known_task as known_task
from .tasks.tasks import TASKS as TASKS
from .tasks.tasks import Task as Task
from .tasks.tasks import find_task as find_task
from .tasks.tasks import generate as generate
from .tasks.tasks import readable_pairs as readable_pairs
from .tasks.tasks import task as task
from .tasks.wording import Split as Split
from .tasks.wording import pair_from as pair_from

__all__ = [
    "TASKS",
    "Activations",
    "AlignedPairs",
    "Corpus",
    "Documents",
    "PromptPair",
    "RowSplit",
    "Rules",
    "Split",
    "Storage",
    "Store",
    "Task",
    "aligned",
    "all_tasks",
    "documents_of",
    "find_task",
    "generate",
    "harvest",
    "known_task",
    "pair_from",
    "read_activations",
    "read_corpus",
    "read_pairs",
    "read_rows",
    "readable_pairs",
    "split_rows",
    "task",
    "task_from_file",
    "token_rows",
    "write_pairs",
]

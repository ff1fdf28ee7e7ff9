from .page import write_tour as write_tour
from .run import run_tour as run_tour

__all__ = ["run_tour", "write_tour"]

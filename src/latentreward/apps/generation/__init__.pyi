from .lora import load_lora
from .search import Candidates, best_of_n, search_latents
from .step_search import StepSearch, policy_of

__all__ = [
    "Candidates",
    "StepSearch",
    "best_of_n",
    "load_lora",
    "policy_of",
    "search_latents",
]

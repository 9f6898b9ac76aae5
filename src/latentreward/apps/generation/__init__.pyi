from .lora import load_lora
from .search import Candidates, Population, best_of_n, search_latents, search_population
from .step_search import StepSearch, policy_of

__all__ = [
    "Candidates",
    "Population",
    "StepSearch",
    "best_of_n",
    "load_lora",
    "policy_of",
    "search_latents",
    "search_population",
]

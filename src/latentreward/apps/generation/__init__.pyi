from .lora import load_lora
from .pipelines import policy_of
from .population import Population, search_population
from .search import BestOf, Candidates, best_of_n, search_latents
from .step_search import StepSearch

__all__ = [
    "BestOf",
    "Candidates",
    "Population",
    "StepSearch",
    "best_of_n",
    "load_lora",
    "policy_of",
    "search_latents",
    "search_population",
]

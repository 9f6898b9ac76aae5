"""Sampling of images from a policy: loading; best of N, step-wise and population search by a reward; files."""

from latentreward.generation.best_of import BestOf, best_of_n
from latentreward.generation.lora import load_lora
from latentreward.generation.pipelines import policy_of
from latentreward.generation.population import Population, search_population
from latentreward.generation.search import Candidates, search_latents
from latentreward.generation.step_search import StepSearch

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

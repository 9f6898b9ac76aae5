"""Pictures of a policy: loading it, choosing among samples with any reward, and writing what it makes."""

from latentreward.generation.best_of import BestOf, best_of_n
from latentreward.generation.lora import load_lora
from latentreward.generation.pipelines import policy_of
from latentreward.generation.search import Candidates, search_latents
from latentreward.generation.step_search import StepSearch

__all__ = ["BestOf", "Candidates", "StepSearch", "best_of_n", "load_lora", "policy_of", "search_latents"]

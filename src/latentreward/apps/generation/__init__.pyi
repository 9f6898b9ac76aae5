from .lora import load_lora
from .search import Candidates, best_of_n, choose_best, search_latents

__all__ = [
    "Candidates",
    "best_of_n",
    "choose_best",
    "load_lora",
    "search_latents",
]

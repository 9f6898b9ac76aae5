from .lora import load_lora
from .search import Candidates, best_of_n, search_latents

__all__ = [
    "Candidates",
    "best_of_n",
    "load_lora",
    "search_latents",
]

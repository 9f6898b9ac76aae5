"""Training of the tiny world's pipelines and pixel scorers from scratch."""

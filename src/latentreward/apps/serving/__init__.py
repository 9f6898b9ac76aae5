"""HTTP server that scores latents and images with a reward model (extra ``serve``)."""

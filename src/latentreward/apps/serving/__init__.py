"""HTTP server that scores latents and images with reward models (extra ``serve``)."""

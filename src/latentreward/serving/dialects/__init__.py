"""Wire formats of other frameworks' clients, whose requests hold images and prompts."""

"""Distributions of pixels and latents, and the priors of latents."""

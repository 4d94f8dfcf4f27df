"""Networks in float64, with side information: formats 1 and 2, and all models with latents."""

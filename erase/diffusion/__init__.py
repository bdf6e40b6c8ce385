"""Diffusion models as backends: the denoiser contract, its losses, and the adapters for diffusers' models."""

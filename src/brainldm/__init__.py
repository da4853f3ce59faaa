"""Latent diffusion models of 3-D T1-weighted brain MRI, from a study's scans to brains of nobody."""

__version__ = "0.1.0"

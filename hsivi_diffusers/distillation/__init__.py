"""Distillation of a pretrained diffusion network into a few layers, without training data."""

"""Pretrained diffusion models as teachers: one file a kind."""

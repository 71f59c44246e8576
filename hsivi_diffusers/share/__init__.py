"""Pushing to the Hub: commit and model card."""

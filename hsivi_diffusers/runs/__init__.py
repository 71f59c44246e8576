"""The folder of a run: checkpoints, records and page."""

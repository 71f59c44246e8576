"""The command `hsivi`."""

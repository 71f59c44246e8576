"""`python -m hsivi_diffusers`, the same as the command `hsivi`."""

from .commands.cli import main

if __name__ == "__main__":
    main()

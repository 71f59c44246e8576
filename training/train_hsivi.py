"""Distils a pretrained diffusion pipeline; the same program as `hsivi distil`.

accelerate launch training/train_hsivi.py --config training/configs/digits_t5.yaml
"""

import sys

from hsivi_diffusers.commands.cli import main

if __name__ == "__main__":
    main(["distil", *sys.argv[1:]])

"""Distils a pretrained diffusion UNet into T layers; what `accelerate launch` runs.

accelerate launch training/train_hsivi.py --config training/configs/digits_t5.yaml
"""

from hsivi_diffusers.distillation.run import main

if __name__ == "__main__":
    main()

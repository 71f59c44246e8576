"""Networks with exact answers, of pixels that are independent N(MEAN, STD^2): a teacher of them, and its ODE."""

from types import SimpleNamespace

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from hsivi_diffusers.teachers.teacher import Teacher

MEAN, STD = 0.3, 0.4


class Network(torch.nn.Module):
    """Answers with a given clean image, in the prediction of the schedule; one parameter shifts the answer."""

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(num_class_embeds=None)

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule
        self.shift = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, timestep):
        level = self.schedule.levels.level(torch.as_tensor(timestep).reshape(-1))
        alpha, sigma = self.schedule.alpha_sigma(level, x)
        x0 = self.clean(x, level)
        noise = (x - alpha * x0) / sigma
        output = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "sample": x0}
        output["flow_prediction"] = noise - x0
        return UNet2DOutput(sample=output[self.schedule.config.prediction_type] + self.shift)


class GaussianTeacher(Network):
    """The exact network."""

    def clean(self, x, timestep):
        alpha, sigma = self.schedule.alpha_sigma(timestep, x)
        return MEAN + STD**2 * alpha * (x - MEAN * alpha) / (STD**2 * alpha**2 + sigma**2)


def as_teacher(network, schedule):
    """A teacher of a network of images of 8x8."""
    return Teacher(
        network, schedule, (getattr(network.config, "in_channels", 1), 8, 8), network.config.num_class_embeds or 0
    )


def exact_flow(schedule, x, timestep, below):
    """Where the teacher's ODE leads from one timestep to another: the noise in units of its spread stays."""
    (alpha, sigma), (alpha_below, sigma_below) = (schedule.alpha_sigma(each, x) for each in (timestep, below))
    spread, spread_below = (STD**2 * a**2 + s**2 for a, s in ((alpha, sigma), (alpha_below, sigma_below)))
    return alpha_below * MEAN + (spread_below / spread).sqrt() * (x - alpha * MEAN)


def ddim_step(schedule, x0, x, timestep, below):
    """DDIM with eta 0 (Song et al. 2021, eq. 12), of the clean image x0."""
    alpha, sigma = schedule.alpha_sigma(timestep, x)
    alpha_below, sigma_below = schedule.alpha_sigma(below, x)
    return alpha_below * x0 + sigma_below * (x - alpha * x0) / sigma

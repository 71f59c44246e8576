"""`training/benchmarks/images/polished_solver.py`: what the network is told, noise and contrast of a solver."""

from pathlib import Path

import torch

from hsivi_diffusers import HSIVIScheduler
from training.benchmarks.images.set_teacher import SetTeacher

ASSETS = Path(__file__).parents[2] / "assets"


def test_the_network_is_told_other_times_than_those_of_the_solvers_levels():
    teacher, told = SetTeacher(str(ASSETS / "digits_ddpm"), "digits"), []
    polish = {"told": [650.0, 90.5], "noise_scale": 1.5, "contrast": 0.5, "brightness": 0.25}
    solver = teacher.solver("UniPC", 2, [700.5, 100.0], polish=polish)
    teacher.teacher.network.register_forward_pre_hook(lambda _, given: told.append(given))
    image = teacher.draw(solver, 1, 1, 0)
    assert [float(time) for _, time in told] == polish["told"]
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(told[0][0], 1.5 * noise)
    assert 0.375 - 1e-6 <= image.min() < image.max() <= 0.875 + 1e-6  # a clipped image of half the contrast
    alphas = HSIVIScheduler().alphas_cumprod
    sigmas = (1 / alphas[[700, 701, 100]] - 1).sqrt().double()
    expected = torch.stack([(sigmas[0] * sigmas[1]).sqrt(), sigmas[2]]).float()
    torch.testing.assert_close(solver.scheduler.sigmas[:2], expected, rtol=1e-5, atol=0)

"""Half precision, recomputed activations, clipped gradients and TF32."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hsivi_diffusers import HSIVIScheduler, UNetCritic, load_teacher
from hsivi_diffusers.distillation import updates
from hsivi_diffusers.distillation.config import HSIVIConfig
from hsivi_diffusers.distillation.networks import load_networks
from hsivi_diffusers.distillation.trainer import make_accelerator
from hsivi_diffusers.teachers.teacher import load_parts

SHORT = {"max_train_steps": 2, "critic_updates": 1, "lr_warmup_steps": 0}


def weights(folder):
    paths = [folder / name / "diffusion_pytorch_model.safetensors" for name in ("pipeline/unet", "critic")]
    return [load_file(path) for path in paths]


@pytest.fixture
def steps(monkeypatch):
    """What the loop yields, step by step."""
    seen, fit = [], updates.fit

    def recording(*given, **named):
        for step in fit(*given, **named):
            seen.append(step)
            yield step

    monkeypatch.setattr(updates, "fit", recording)
    return seen


@pytest.fixture(scope="module")
def bf16_runs(launch, tmp_path_factory):
    """Runs in bf16, by preset, in processes of their own: accelerate keeps one precision for a process."""
    folders = tmp_path_factory.mktemp("bf16")
    for preset in ("fast", "paper"):
        statuses, text = launch(folders / preset, preset=preset, mixed_precision="bf16", **SHORT)
        assert statuses == [0], text
    return folders


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_bf16_trains_near_to_full_precision(distil, bf16_runs, tmp_path, preset):
    full = distil(tmp_path / "full", preset=preset, **SHORT)
    for got, wanted in zip(weights(bf16_runs / preset), weights(full), strict=True):
        assert any(not got[name].equal(tensor) for name, tensor in wanted.items())
        for name, tensor in wanted.items():
            assert got[name].dtype == torch.float32
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=4e-3)


def test_a_bf16_run_resumes(launch, bf16_runs, tmp_path, differences):
    options = {"mixed_precision": "bf16", "preset": "paper", **SHORT}
    assert launch(tmp_path / "run", kill={"point": "SIGTERM", "step": 1}, **options)[0] == [75]
    assert launch(tmp_path / "run", resume_from_checkpoint="latest", **options)[0] == [0]
    assert differences(tmp_path / "run", bf16_runs / "paper") == []


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_the_teacher_alone_is_kept_in_half_precision(teacher, precision, dtype, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr("diffusers.models.modeling_utils.logger.warning", told.append)
    accelerator = SimpleNamespace(device="cpu", mixed_precision=precision, main_process_first=nullcontext)
    networks = load_networks(load_parts(str(teacher)), HSIVIConfig(), accelerator)
    assert networks.teacher.dtype == dtype
    assert networks.student.dtype == networks.critic.dtype == torch.float32
    assert told == []  # diffusers warns of a cast, even where nothing is to be kept in single precision


def test_fp16_on_a_cpu_is_refused(distil, tmp_path, fresh_accelerator):
    with pytest.raises(ValueError, match="fp16.* requires a GPU"):  # by us, or by an older accelerate
        distil(tmp_path / "run", mixed_precision="fp16")
    assert not (tmp_path / "run").exists()


def test_scores_are_formed_in_full_precision(teacher):
    """1/sigma is 100 at timestep 0: what is lost is the network's rounding alone."""
    unet, schedule = load_teacher(str(teacher))
    critic = UNetCritic(unet.eval(), HSIVIScheduler.from_config(schedule.config, layer_timesteps=[440, 0]))
    level = torch.arange(6)
    x = torch.randn(6, 1, 8, 8)
    with torch.no_grad():
        full = critic(x, level)
        for dtype in (torch.float16, torch.bfloat16):
            critic.unet.to(dtype)
            half = critic(x, level)
            assert half.dtype == torch.float32
            assert half.isfinite().all()
            noise = unet(x.to(dtype), level).sample.float()
            _, sigma = critic.scheduler.alpha_sigma(level, x)
            torch.testing.assert_close(half, -noise / sigma)
            assert (half - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_activations_computed_twice_give_the_same_weights(request, distil, tmp_path, differences, preset):
    folder = distil(tmp_path / "run", preset=preset, gradient_checkpointing=True)
    assert differences(folder, request.getfixturevalue(f"{preset}_run")) == []


def test_gradients_are_clipped_to_the_norm(distil, tmp_path, steps, monkeypatch):
    clipped = []
    step = torch.optim.Adam.step

    def recording(self, *given, **named):
        gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        clipped.append(math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients)))
        return step(self, *given, **named)

    monkeypatch.setattr(torch.optim.Adam, "step", recording)
    distil(tmp_path / "clipped", max_grad_norm=0.5, **SHORT)
    norms = [float(update.grad_norm) for step in steps for update in (step.layers, step.critic)]
    assert max(norms) > 1
    assert clipped == pytest.approx([min(norm, 0.5) for norm in norms], rel=1e-3)
    clipped.clear()
    steps.clear()
    distil(tmp_path / "free", **SHORT)
    norms = [float(update.grad_norm) for step in steps for update in (step.layers, step.critic)]
    assert clipped == pytest.approx(norms, rel=1e-3)


@pytest.fixture
def tf32():
    """The two flags, off, and afterwards what they were."""
    flags = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = False
    yield flags
    for flag, value in zip(flags, before, strict=True):
        flag.allow_tf32 = value


@pytest.mark.parametrize("wanted", [False, True])
def test_tf32_is_allowed_where_it_is_asked_for(tf32, wanted):
    make_accelerator(HSIVIConfig(allow_tf32=wanted))
    assert [flag.allow_tf32 for flag in tf32] == [wanted, wanted]

"""The state of a run: optimizers, average, chains, and what of it is saved."""

import copy
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file

from hsivi_diffusers import HSIVIConfig, HSIVIScheduler, HSIVITrainer
from hsivi_diffusers.distillation import pairs, plan, state
from hsivi_diffusers.distillation.networks import make_networks
from hsivi_diffusers.distillation.updates import run_updates
from hsivi_diffusers.runs.state_dicts import load_state_dict, save_state_dict
from hsivi_diffusers.teachers.pixels import Pixels
from tiny_unet import make_unet

ONE = {"preset": "one_call", "num_inference_steps": 1, "num_pairs": 4, "critic_first": 1}


@pytest.fixture
def make(fresh_accelerator):
    """Makes the TrainingState of a run of a network with a schedule."""

    def state_of(unet, schedule=None, **settings):
        teacher = Pixels.of(SimpleNamespace(unet=unet), schedule or HSIVIScheduler())
        config = HSIVIConfig(**{"num_inference_steps": 2, "train_batch_size": 1, **settings})
        made = make_networks(teacher, copy.deepcopy(unet), copy.deepcopy(unet), config)
        return state.TrainingState(made, config, Accelerator(cpu=True))

    return state_of


@pytest.mark.parametrize(("side", "highest"), [(8, 800), (32, 956)])
def test_the_random_levels_end_at_a_signal(make, side, highest):
    assert make(make_unet(sample_size=side)).bridge.level_range == (5, highest)


def test_layers_that_are_scored_at_their_own_levels_need_no_others(make, unet):
    assert make(unet, preset="paper", num_inference_steps=100).bridge.num_layers == 100


@pytest.mark.parametrize(
    ("scale", "drawn"), [(None, {0, 1, 2}), (1.0, {0, 1, 2}), (3.0, {0, 1}), ([1.0, 3.0], {0, 1, 2, 3})]
)
def test_all_classes_are_trained_unless_the_last_is_no_class_of_guidance(make, scale, drawn):
    made = make(make_unet(num_class_embeds=3), guidance_scale=scale)
    assert set(made.sample_condition(400, torch.Generator().manual_seed(0)).tolist()) == drawn
    assert made.bridge.guides == (scale not in (None, 1.0))


def test_classes_are_drawn_by_their_shares(make):
    draw = make(make_unet(num_class_embeds=3), class_shares=[3.0, 0.0, 1.0]).sample_condition
    counts = draw(4000, torch.Generator().manual_seed(0)).bincount(minlength=3).tolist()
    assert counts == pytest.approx([3000, 0, 1000], abs=100)


@pytest.mark.parametrize(("preset", "clips"), [("one_call", True), ("paper", False)])
def test_the_student_clips_images_as_the_objective_has_it(make, unet, preset, clips):
    assert make(unet, preset=preset, num_pairs=0).student.clip_images is clips


def test_a_noise_scale_has_a_learning_rate_of_its_own(make_state, monkeypatch):
    monkeypatch.setattr(state, "NOISE_SCALE_LEARNING_RATE", 0.0)
    made = make_state(noise_scale_type="per_pixel", critic_updates=1, lr_warmup_steps=0)
    before = made.student.network.conv_in.weight.clone()
    steps = run_updates(made, 0)
    next(steps)  # of a critic that is the teacher, the student has nothing to learn
    next(steps)
    assert made.student.noise_scale().unique().tolist() == [1.0]
    assert not torch.equal(made.student.network.conv_in.weight, before)


def test_the_average_is_that_of_the_weights(make_state):
    """The first update sets the average, the others enter it with 1 - decay."""
    made, averaged = make_state(max_train_steps=3, critic_updates=1, ema_decay=0.15), None
    for _ in run_updates(made, 0):
        weights = [weight.detach().clone() for weight in made.student.parameters()]
        averaged = [a.lerp(w, 0.85) for a, w in zip(averaged, weights, strict=True)] if averaged else weights
    assert not torch.equal(averaged[0], weights[0])
    own, average = ([each.data_ptr() for each in of] for of in (made.student.parameters(), made.ema.shadow_params))
    with made.averaging() as student:
        assert not student.training
        assert [each.data_ptr() for each in student.parameters()] == average  # exchanged, not copied
        for got, wanted in zip(student.parameters(), averaged, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    assert made.student.training
    assert all(map(torch.equal, made.student.parameters(), weights))
    assert [each.data_ptr() for each in made.student.parameters()] == own


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"])
def test_every_schedule_of_learning_rates_that_is_accepted_can_be_trained(make, unet, name):
    schedules = make(unet, lr_scheduler=name).lr_schedulers
    assert [schedule.get_last_lr()[0] >= 0 for schedule in schedules] == [True, True]


def test_each_micro_batch_has_its_share_of_the_pairs(make_state):
    made = make_state(**{**ONE, "num_pairs": 6}, gradient_accumulation_steps=2)
    t, seen = torch.zeros(40, dtype=torch.long), []
    for chain in made.chains:
        batches = [chain.draw(made.layers) for _ in range(100)]
        inputs = torch.cat([each.x_next for each in batches]).flatten(1)
        fresh = torch.cat([each.end for each in batches]).flatten(1).isnan().any(1)
        seen.append({row.sum().item() for row in inputs[~fresh]})
        assert seen[-1] == {row.sum().item() for row in chain.sample_pairs(t, None)[0]}
        assert len(inputs[fresh].unique(dim=0)) == fresh.sum() > len(inputs) / 2
    assert [len(each) for each in seen] == [3, 3]
    assert not seen[0] & seen[1]


def test_pairs_of_a_class_conditional_teacher_have_classes(make_state, class_teacher):
    condition = make_state(class_teacher, **{**ONE, "num_pairs": 24}).pairs(0).condition
    assert set(condition.tolist()) == {0, 1, 2}
    assert len(condition) == 24


def test_kept_ends_are_of_the_same_options_and_number(make_state, tmp_path, monkeypatch):
    """Those of fewer pairs, of a run with more micro-batches, follow from other noise."""
    drawn, solve = [], pairs.solver_states
    monkeypatch.setattr(pairs, "solver_states", lambda *given: drawn.append(len(given[2])) or solve(*given))

    def ends(**settings):
        made = make_state(output_dir=tmp_path, **ONE, **settings)
        drawn.clear()
        return made.pairs(0).mean, sum(drawn)

    first, number = ends()
    again, remade = ends()
    assert torch.equal(first, again)
    assert (number, remade) == (4, 0)
    fewer, number = ends(gradient_accumulation_steps=2)
    assert (len(fewer), number) == (2, 2)
    assert ends(seed=1)[1] == 4


def test_gradients_are_clipped_to_the_norm(make_state, monkeypatch):
    clipped, step = [], torch.optim.Adam.step

    def recording(self, *given, **named):
        gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        clipped.append(math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients)))
        return step(self, *given, **named)

    monkeypatch.setattr(torch.optim.Adam, "step", recording)
    for limit in (0.5, None):
        clipped.clear()
        made = make_state(max_grad_norm=limit, max_train_steps=2, critic_updates=1, lr_warmup_steps=0)
        steps = list(run_updates(made, 0))
        norms = [float(update.grad_norm) for each in steps for update in (each.layers, each.critic)]
        assert max(norms) > 1
        assert clipped == pytest.approx([min(norm, limit or math.inf) for norm in norms], rel=1e-3)


def test_a_network_that_cannot_recompute_activations_is_refused(make, unet, monkeypatch):
    monkeypatch.delattr(type(unet).__mro__[1], "enable_gradient_checkpointing")
    with pytest.raises(ValueError, match="gradient_checkpointing=True: a UNet2DModel has none: leave it out"):
        make(unet, gradient_checkpointing=True)


# ----- Adam in 8 bits, by bitsandbytes, which `make test-slow` installs -----

EIGHT = {"use_8bit_adam": True, "max_train_steps": 2, "critic_updates": 1, "lr_warmup_steps": 0}


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """Of a run whose teacher has weights of more than 4,096 numbers: the moments of others are not changed."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    DDPMPipeline(make_unet(block_out_channels=(24, 24)), DDPMScheduler()).save_pretrained(folder)
    return folder


def test_8_bit_adam_is_refused_without_bitsandbytes_before_the_teacher_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(
        ValueError, match="use_8bit_adam=True needs bitsandbytes: run `pip install 'bitsandbytes>=0.50'`"
    ):
        HSIVITrainer("nowhere", HSIVIConfig(use_8bit_adam=True))


def test_a_tensor_under_two_names_is_saved(tmp_path):
    """As the codes of all moments in 8 bits are."""
    codes = torch.arange(5.0)
    save_state_dict({0: {"qmap": codes}, 1: {"qmap": codes}}, tmp_path / "state.safetensors")
    saved = load_state_dict(tmp_path / "state.safetensors")
    assert all(saved[name]["qmap"].equal(codes) for name in (0, 1))


@pytest.mark.slow
def test_a_run_with_8_bit_adam_resumes_to_the_same_bits_near_to_full_precision(eight, launch, tmp_path, differences):
    options = {**EIGHT, "pretrained_teacher_model": eight}
    whole, run, full = (tmp_path / name for name in ("whole", "run", "full"))
    assert launch(whole, **options)[0] == launch(full, **{**options, "use_8bit_adam": False})[0] == [0]
    assert launch(run, kill={"point": "SIGTERM", "step": 1}, **options)[0] == [75]
    assert launch(run, resume_from_checkpoint="latest", **options)[0] == [0]
    assert differences(run, whole) == []
    moments = load_file(run / "checkpoints" / "checkpoint-2" / "layer_optimizer.safetensors")
    assert torch.uint8 in {moment.dtype for moment in moments.values()}
    got, wanted = (load_file(each / "pipeline/unet/diffusion_pytorch_model.safetensors") for each in (whole, full))
    assert any(not got[name].equal(weight) for name, weight in wanted.items())
    for name, weight in wanted.items():
        torch.testing.assert_close(got[name], weight, rtol=0, atol=1e-5)  # the run moves weights by 6e-5


@pytest.mark.slow
def test_8_bit_adam_is_planned(eight, make_state):
    made = make_state(eight, **EIGHT)
    next(run_updates(made, 0))
    optimizers = (made.layer_optimizer, made.critic_optimizer)
    kept = [moment for each in optimizers for values in each.state.values() for moment in values.items()]
    names = ("state1", "state2", "absmax1", "absmax2")
    held = sum(moment.numel() * moment.element_size() for name, moment in kept if name in names)
    steps = 4 * (len(list(made.layers.parameters())) + len(list(made.critic.parameters())))
    full = replace(made.config, use_8bit_adam=False)
    cost, usual = (plan.measure(str(eight), None, each).memory for each in (made.config, full))
    assert cost["Adam's moments"] == held + steps
    assert held < usual["Adam's moments"] / 2
    assert cost["activations and gradients"] == pytest.approx(usual["activations and gradients"])

import pytest
import torch
from diffusers import DDPMPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file

from hsivi_diffusers.evaluation.images import load_images, to_model_range
from training.benchmarks.images import train_teacher, training_loop


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Trains for 3 steps and returns the output folder."""

    def run(*arguments):
        folder = tmp_path_factory.mktemp("teachers") / "teacher"
        sizes = [
            "--block_out_channels",
            "8",
            "16",
            "--max_train_steps=3",
            "--train_batch_size=4",
            "--lr_warmup_steps=1",
        ]
        train_teacher.main([*sizes, f"--output_dir={folder}", *arguments])
        return folder

    return run


@pytest.fixture(scope="module")
def trained(train):
    return train()


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched: this program runs in one"):
        train_teacher.main([f"--output_dir={tmp_path / 'teacher'}"])


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_the_output_is_a_stock_pipeline_of_the_network_asked_for(train):
    folder = train("--attention_levels", "0", "--resolution=16", "--channels=3")
    pipeline = DDPMPipeline.from_pretrained(folder)
    config = pipeline.unet.config
    assert (config.sample_size, config.in_channels, config.out_channels) == (16, 3, 3)
    assert tuple(config.block_out_channels) == (8, 16)
    assert tuple(config.down_block_types) == ("AttnDownBlock2D", "DownBlock2D")
    assert tuple(config.up_block_types) == ("UpBlock2D", "AttnUpBlock2D")
    (images,) = pipeline(2, num_inference_steps=2, output_type="np", return_dict=False)
    assert images.shape == (2, 16, 16, 3)


def test_a_run_is_a_function_of_its_seed(train, trained, same_tensors):
    assert same_tensors(weights(train("--seed=0")), weights(trained))
    assert not same_tensors(weights(train("--seed=1")), weights(trained))


def test_the_averaged_weights_are_saved(train, monkeypatch):
    """The first update sets the average, the others enter it with 1 - decay."""
    visited = []

    class Recorded(training_loop.EMAModel):
        def step(self, parameters):
            visited.append(parameters[0].detach().clone())
            super().step(parameters)

    monkeypatch.setattr(training_loop, "EMAModel", Recorded)
    saved = DDPMPipeline.from_pretrained(train("--ema_decay=0.15")).unet
    first, second, third = visited
    assert not torch.equal(first, second)
    torch.testing.assert_close(next(saved.parameters()), first.lerp(second, 0.85).lerp(third, 0.85), rtol=0, atol=1e-6)


def test_the_loss_falls(train, monkeypatch):
    losses = []
    mse_loss = train_teacher.mse_loss
    monkeypatch.setattr(train_teacher, "mse_loss", lambda *given: losses.append(mse_loss(*given)) or losses[-1])
    train("--max_train_steps=40", "--train_batch_size=32", "--learning_rate=3e-3")
    assert len(losses) == 40
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow_prediction"])
def test_a_perfect_prediction_leads_back_to_the_clean_picture(prediction_type):
    schedule, stock = train_teacher.make_schedules(train_teacher.Network(prediction_type=prediction_type))
    clean, noise = torch.randn(2, 3, 1, 4, 4).unbind()
    levels = torch.tensor([3, 400, 900])
    prediction = train_teacher.target(schedule, clean, noise, levels)
    noisy = schedule.diffuse(clean, noise, levels)
    if prediction_type == "flow_prediction":
        found = noisy - schedule.alpha_sigma(levels, clean)[1] * prediction
    else:
        stock.register_to_config(clip_sample=False)
        found = torch.stack(
            [stock.step(prediction[i], levels[i], noisy[i]).pred_original_sample for i in range(len(levels))]
        )
    torch.testing.assert_close(found, clean, rtol=0, atol=1e-4)


def test_the_pipeline_knows_what_the_network_predicts(train, trained):
    assert DDPMPipeline.from_pretrained(trained).scheduler.config.prediction_type == "epsilon"
    folder = train("--prediction_type=v_prediction")
    assert DDPMPipeline.from_pretrained(folder).scheduler.config.prediction_type == "v_prediction"
    assert weights(folder).keys() == weights(trained).keys()


def test_a_class_conditional_teacher_is_told_the_classes_of_its_images_and_has_its_clock(train, trained, monkeypatch):
    told, drawn = [], []
    forward, diffuse = train_teacher.UNet2DModel.forward, train_teacher.HSIVIScheduler.diffuse

    def recorded(self, *given, class_labels=None):
        told.append(class_labels)
        return forward(self, *given, class_labels=class_labels)

    def noised(self, clean, *given):
        drawn.append(clean)
        return diffuse(self, clean, *given)

    monkeypatch.setattr(train_teacher.UNet2DModel, "forward", recorded)
    monkeypatch.setattr(train_teacher.HSIVIScheduler, "diffuse", noised)
    teacher = DDPMPipeline.from_pretrained(train("--class_conditional=true", "--beta_schedule=squaredcos_cap_v2"))
    assert teacher.unet.config.num_class_embeds == 10
    assert teacher.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    images, labels = load_images("digits", 8, 1)
    real = to_model_range(images).flatten(1)
    nearest = torch.cdist(torch.cat(drawn).flatten(1), real).argmin(1)
    assert torch.equal(labels[nearest], torch.cat(told))
    assert DDPMPipeline.from_pretrained(trained).unet.config.num_class_embeds is None


def test_a_teacher_to_be_guided_has_a_label_for_no_class(train, monkeypatch):
    told, forward = [], train_teacher.UNet2DModel.forward

    def recorded(self, *given, class_labels=None):
        told.append(class_labels)
        return forward(self, *given, class_labels=class_labels)

    monkeypatch.setattr(train_teacher.UNet2DModel, "forward", recorded)
    folder = train("--class_conditional=true", "--class_dropout=0.3", "--max_train_steps=20", "--train_batch_size=32")
    assert DDPMPipeline.from_pretrained(folder).unet.config.num_class_embeds == 11
    shares = torch.bincount(torch.cat(told), minlength=11) / 640
    assert shares[10].item() == pytest.approx(0.3, abs=0.06)
    assert bool((shares[:10] > 0.03).all())
    for options in (["--class_dropout=0.1"], ["--class_conditional=true", "--class_dropout=1.0"]):
        with pytest.raises(ValueError, match="give a share from 0 to below 1, with --class_conditional true"):
            train(*options)


def test_the_teacher_of_a_rectified_flow_is_a_stock_pipeline_too(train):
    pipeline = DDPMPipeline.from_pretrained(train("--prediction_type=flow_prediction"))
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    (images,) = pipeline(2, num_inference_steps=3, output_type="np", return_dict=False)
    assert images.shape == (2, 8, 8, 1)


def test_a_class_conditional_teacher_needs_classes(train, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    with pytest.raises(ValueError, match="--class_conditional true, and --train_data .* has no classes: give a folder"):
        train("--class_conditional=true", f"--train_data={tmp_path}")


def test_a_loss_that_is_not_finite_stops_the_run(train, monkeypatch):
    calls = []
    mse_loss = train_teacher.mse_loss

    def poisoned(*given):
        calls.append(given)
        return mse_loss(*given) * (1 if len(calls) < 3 else torch.nan)

    monkeypatch.setattr(train_teacher, "mse_loss", poisoned)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 2: lower --learning_rate"):
        train()


def test_a_filled_output_folder_is_refused_before_work_unless_overwritten(trained, train, overwrite):
    folder = overwrite(train, train_teacher, "load_images")
    assert weights(folder).keys() == weights(trained).keys()


def test_help(check_help):
    check_help(train_teacher.main, "data", "network", "training", "run")

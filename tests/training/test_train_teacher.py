import pytest
import torch
from diffusers import DDPMPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file

from hsivi_diffusers.evaluation.images import load_images, to_model_range
from training.benchmarks.images import train_teacher


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Trains for 3 steps and returns the output folder."""

    def run(*arguments):
        folder = tmp_path_factory.mktemp("teachers") / "teacher"
        sizes = ["--block_out_channels", "8", "16"]
        sizes += ["--max_train_steps=3", "--train_batch_size=4", "--lr_warmup_steps=1"]
        train_teacher.main([*sizes, f"--output_dir={folder}", *arguments])
        return folder

    return run


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_a_run_is_a_function_of_its_seed(train, same_tensors):
    first, again, other = (weights(train(f"--seed={seed}")) for seed in (0, 0, 1))
    assert same_tensors(first, again)
    assert not same_tensors(first, other)


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


@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow_prediction"])
def test_the_output_is_a_stock_pipeline_of_the_network_and_schedule_asked_for(train, prediction_type):
    sizes = ["--attention_levels", "0", "--resolution=16", "--channels=3", "--beta_schedule=squaredcos_cap_v2"]
    pipeline = DDPMPipeline.from_pretrained(train(*sizes, f"--prediction_type={prediction_type}"))
    config = pipeline.unet.config
    assert (config.sample_size, config.in_channels, config.out_channels) == (16, 3, 3)
    assert (tuple(config.block_out_channels), config.num_class_embeds) == ((8, 16), None)
    assert tuple(config.down_block_types) == ("AttnDownBlock2D", "DownBlock2D")
    assert tuple(config.up_block_types) == ("UpBlock2D", "AttnUpBlock2D")
    if prediction_type == "flow_prediction":
        assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    else:
        found = pipeline.scheduler.config.prediction_type, pipeline.scheduler.config.beta_schedule
        assert found == (prediction_type, "squaredcos_cap_v2")
    (images,) = pipeline(2, num_inference_steps=2, output_type="np", return_dict=False)
    assert images.shape == (2, 16, 16, 3)


def test_a_class_conditional_teacher_learns_and_is_given_the_classes_of_its_images_and_of_some_none(train, monkeypatch):
    given, drawn, losses, mse_loss = [], [], [], train_teacher.mse_loss
    forward, diffuse = train_teacher.UNet2DModel.forward, train_teacher.HSIVIScheduler.diffuse

    def recorded(self, *inputs, class_labels=None):
        given.append(class_labels)
        return forward(self, *inputs, class_labels=class_labels)

    def noised(self, clean, *noise):
        drawn.append(clean)
        return diffuse(self, clean, *noise)

    monkeypatch.setattr(train_teacher.UNet2DModel, "forward", recorded)
    monkeypatch.setattr(train_teacher.HSIVIScheduler, "diffuse", noised)
    monkeypatch.setattr(train_teacher, "mse_loss", lambda *given: losses.append(mse_loss(*given)) or losses[-1])
    options = ["--class_conditional=true", "--class_dropout=0.3", "--learning_rate=3e-3"]
    folder = train(*options, "--max_train_steps=40", "--train_batch_size=32")
    assert len(losses) == 40
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert DDPMPipeline.from_pretrained(folder).unet.config.num_class_embeds == 11
    classes = torch.cat(given)
    images, labels = load_images("digits", 8, 1)
    nearest = torch.cdist(torch.cat(drawn).flatten(1), to_model_range(images).flatten(1)).argmin(1)
    assert torch.equal(labels[nearest][classes < 10], classes[classes < 10])
    shares = torch.bincount(classes, minlength=11) / len(classes)
    assert shares[10].item() == pytest.approx(0.3, abs=0.06)
    assert bool((shares[:10] > 0.03).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--class_dropout=0.1"], "give a share from 0 to below 1, with --class_conditional true"),
        (["--class_conditional=true", "--class_dropout=1.0"], "give a share from 0 to below 1"),
        (["--class_conditional=true", "--train_data=FOLDER"], "--train_data .* has no classes: give a folder with"),
    ],
)
def test_classes_that_cannot_be_learned_are_refused(train, tmp_path, options, message):
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    with pytest.raises(ValueError, match=message):
        train(*(word.replace("FOLDER", str(tmp_path)) for word in options))


def test_several_processes_are_refused(train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched: this program runs in one, start one"):
        train()

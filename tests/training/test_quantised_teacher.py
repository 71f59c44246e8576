"""A teacher of quantised weights, by bitsandbytes, which `make test-slow` installs: the base of the adapters."""

from contextlib import nullcontext

import pytest
import torch
from diffusers import BitsAndBytesConfig, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.quantizers.bitsandbytes import bnb_quantizer
from safetensors.torch import load_file

from hsivi_diffusers import HSIVIConfig, HSIVIScheduler, HSIVITrainer
from hsivi_diffusers.distillation.networks import check_fit
from hsivi_diffusers.runs.artifacts import ADAPTER
from hsivi_diffusers.teachers.adapters import add_adapter
from hsivi_diffusers.teachers.teacher import fingerprint, load_parts, network_of
from tiny_text import PROMPTS, make_text

SETTINGS = {"num_inference_steps": 2, "prompts": PROMPTS, "guidance_scale": 3.0, "lora_rank": 4, "train_batch_size": 2}
SETTINGS |= {
    "max_train_steps": 2,
    "learning_rate": 1e-2,
    "lr_warmup_steps": 0,
    "ema_decay": 0.0,
    "checkpointing_steps": 1,
}


@pytest.mark.parametrize(
    ("kind", "bits", "rank", "storage", "accepted"),
    [
        ("sd", 4, 4, torch.uint8, True),
        ("sdxl", 4, None, torch.uint8, True),
        ("sd", 4, 0, torch.uint8, False),
        ("sd", 8, 4, torch.uint8, False),
        ("sd", 4, 4, torch.bfloat16, False),
        ("pixart", 4, None, torch.uint8, False),
    ],
)
def test_quantised_weights_are_the_base_of_adapters_in_4_bits_alone(kind, bits, rank, storage, accepted):
    class Params4bit(torch.nn.Parameter):
        pass

    network = network_of(make_text(kind))
    network.is_quantized, network.is_loaded_in_4bit = True, bits == 4  # as diffusers says of its models
    network.codes = Params4bit(torch.zeros(2, dtype=storage), requires_grad=False)
    refusal = pytest.raises(ValueError, match="the teacher has quantised weights, which are supported in 4 bits")
    with nullcontext() if accepted else refusal:
        check_fit(network, HSIVIConfig(**{**SETTINGS, "lora_rank": rank}))


def test_the_hash_of_quantised_weights_is_that_of_their_saved_folder():
    """Whose config says the same in another way."""
    network, _, host, _ = load_parts(make_text("sd"))
    hashes = []
    for told in ({"load_in_4bit": True}, BitsAndBytesConfig, None):
        network.register_to_config(quantization_config=told)
        hashes.append(fingerprint(network, host.scheduler))
    assert len({*hashes}) == 1


@pytest.fixture
def quantised(tmp_path, monkeypatch):
    """A Stable Diffusion with such weights, on a CPU, for which diffusers does not load one."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)  # weights packed for it cannot be trained through
    quantizer = bnb_quantizer.BnB4BitDiffusersQuantizer
    monkeypatch.setattr(quantizer, "validate_environment", lambda self, *args, **options: None)
    monkeypatch.setattr(quantizer, "update_device_map", lambda self, device_map: {"": "cpu"})
    make_text("sd").save_pretrained(tmp_path / "whole")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "whole", subfolder="unet", quantization_config=how)
    StableDiffusionPipeline.from_pretrained(tmp_path / "whole", unet=unet).save_pretrained(tmp_path / "quantised")
    return tmp_path / "quantised"


def load(folder):
    return DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)


def train(teacher, folder, resume=None, **settings):
    trainer = HSIVITrainer(teacher, HSIVIConfig(**{**SETTINGS, **settings}, output_dir=folder))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.slow
def test_adapters_of_quantised_weights_start_as_the_teacher(quantised):
    teacher = load_parts(str(quantised)).network
    x, prompts = torch.randn(2, 2, 8, 8), torch.randn(2, 8, teacher.config.cross_attention_dim)
    with torch.no_grad():
        answers = [each(x, 500, prompts).sample for each in (teacher, add_adapter(teacher, 4), add_adapter(teacher, 4))]
    assert all(answer.equal(answers[0]) for answer in answers)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_adapters_share_quantised_weights_which_stay_as_they_are(quantised, fresh_accelerator, tmp_path, precision):
    """Of a pipeline."""
    before = {name: weight.clone() for name, weight in load(quantised).unet.state_dict().items()}
    state = train(load(quantised), tmp_path / "run", mixed_precision=precision).state
    base = {weight.data_ptr() for weight in state.bridge.unet.parameters()}
    for network in (state.student.unet, state.critic_unet):
        shared = [weight for weight in network.parameters() if not weight.requires_grad]
        assert {weight.data_ptr() for weight in shared} == base
        assert torch.uint8 in {weight.dtype for weight in shared}
        assert {weight.dtype for weight in network.parameters() if weight.requires_grad} == {torch.float32}
    after = state.bridge.unet.state_dict()
    codes = [name for name, weight in before.items() if weight.dtype == torch.uint8]
    assert codes
    assert all(after[name].equal(before[name]) for name in codes)


@pytest.mark.slow
def test_the_file_is_for_the_stock_pipeline_quantised_and_whole(quantised, tmp_path):
    trainer = train(quantised, tmp_path / "run")

    def draw(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        given = {"num_inference_steps": 2, "guidance_scale": 1, "output_type": "pt"}
        return pipeline(PROMPTS, generator=torch.Generator().manual_seed(0), **given).images

    drawn = {}
    for teacher in (quantised, tmp_path / "whole"):
        pipeline = load(teacher)
        pipeline.scheduler = HSIVIScheduler.from_pretrained(tmp_path / "run" / "pipeline", subfolder="scheduler")
        without = draw(pipeline)
        pipeline.load_lora_weights(tmp_path / "run" / "pipeline", weight_name=ADAPTER)
        drawn[teacher] = draw(pipeline)
        assert (drawn[teacher] - without).abs().max() > 0.01
    torch.testing.assert_close(drawn[quantised], draw(trainer.pipeline))
    torch.testing.assert_close(drawn[quantised], drawn[tmp_path / "whole"], atol=0.1, rtol=0)


@pytest.mark.slow
def test_a_resumed_run_ends_as_one_that_was_not_stopped(quantised, tmp_path):
    def stop(trainer, step):
        if step.step == 1:
            raise KeyboardInterrupt

    train(quantised, tmp_path / "never")
    config = HSIVIConfig(**SETTINGS, output_dir=tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        HSIVITrainer(quantised, config, callbacks=[stop]).train()
    train(quantised, tmp_path / "stopped", "latest")
    got, wanted = (load_file(tmp_path / name / "pipeline" / ADAPTER) for name in ("stopped", "never"))
    assert all(got[name].equal(weight) for name, weight in wanted.items())

"""`teachers/starts.py`: published students as a start. None could be had here: see `tiny_lora` for what stands in."""

import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from hsivi_diffusers import HSIVIConfig, load_teacher
from hsivi_diffusers.distillation.networks import load_networks, make_student_and_critic
from hsivi_diffusers.runs.artifacts import ADAPTER
from hsivi_diffusers.teachers.adapters import factor_names, idle_names, of_file, rank_of
from hsivi_diffusers.teachers.loading import load_student, read_teacher
from hsivi_diffusers.teachers.starts import check_start, read_lora
from hsivi_diffusers.teachers.teacher import Teacher, network_of
from hub_server import signed_in
from short_run import contents
from slow import others_slow
from tiny_flows import FLOWS, make_flow
from tiny_lora import write_lora
from tiny_text import PROMPTS, make_text

CPU = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no")
FURTHER = {"sd": ["conv_in", "time_embedding.linear_1"], "sdxl": ["add_embedding.linear_2"], "sd3": ["norm_out.linear"]}


def make_pipeline(kind):
    return make_flow(kind) if kind == "sd3" else make_text(kind)


@pytest.fixture(scope="module")
def folders(text_teachers, tmp_path_factory):
    """Returns that of the teacher of a kind."""

    @cache
    def save(kind):
        folder = tmp_path_factory.mktemp(kind) / "teacher"
        make_pipeline(kind).save_pretrained(folder)
        return folder

    return lambda kind: save(kind) if kind == "sd3" else text_teachers(kind)


@pytest.fixture(scope="module")
def loaded(folders):
    """Stable Diffusion, where nothing is trained."""
    return load_teacher(str(folders("sd")))


@pytest.fixture(scope="module")
def small_lora(tmp_path_factory):
    """The path of a LoRA of Stable Diffusion of rank 4, to be read."""
    return write_lora(make_text("sd"), tmp_path_factory.mktemp("lora") / "lora.safetensors", 4)


@pytest.fixture(params=others_slow(FURTHER, "sd", "sd3"))
def kind(request):
    return request.param


def begin(teacher, start, **settings):
    """The networks of a run that has made no update, of a teacher or of its folder."""
    loaded = teacher if isinstance(teacher, Teacher) else load_teacher(str(teacher))
    given = {"prompts": PROMPTS, "guidance_scale": 2.0} if loaded.takes_text else {}
    config = HSIVIConfig(2, init_from=str(start), **{**given, **settings})
    return load_networks(loaded, config, CPU)[0]


@torch.no_grad()
def answer(teacher, network):
    """What a network answers on noise, with two of the prompts."""
    x = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(0))
    return teacher.call(network.eval(), x, torch.tensor(500.0), torch.tensor([0, 2]) if teacher.takes_text else None)


def stock(folder, lora):
    """The network of the stock pipeline with a LoRA."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    return network_of(pipeline)


def same(one, other):
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


# ----- a LoRA -----


def test_before_an_update_the_student_is_the_stock_pipeline_with_the_lora(folders, kind, tmp_path):
    """With modules that our adapters have not, of two ranks, an alpha, and weights on which no image depends."""
    lora = write_lora(make_pipeline(kind), tmp_path / "x.safetensors", 3, FURTHER[kind], ranks={"to_q": 5})
    networks = begin(folders(kind), lora)
    teacher, student = networks.teacher, networks.student
    of_teacher, found = answer(teacher, teacher.network), answer(teacher, student)
    same(found, answer(teacher, stock(folders(kind), lora)))
    assert (found - of_teacher).abs().max() > 0.05
    assert torch.equal(answer(teacher, networks.critic), of_teacher)
    assert torch.equal(of_teacher, answer(teacher, network_of(DiffusionPipeline.from_pretrained(folders(kind)))))
    assert (rank_of(student), rank_of(networks.critic)) == (5, 64)
    base = {weight.data_ptr() for weight in teacher.network.parameters()}
    for network in (student, networks.critic):
        assert {weight.data_ptr() for weight in network.parameters() if not weight.requires_grad} == base
    assert {name for name, each in student.named_parameters() if each.requires_grad} == {
        name for name, _ in student.named_parameters() if "lora_" in name
    }
    if kind == "sd3":
        (idle,) = idle_names(teacher.network, teacher.adapter)
        assert f"transformer.{idle}.lora_B.weight" in load_file(lora)
        assert not any(name.startswith(idle) for name in get_peft_model_state_dict(student))


@pytest.mark.parametrize("kind", others_slow(FURTHER, "sd"))
def test_its_file_is_that_of_a_student_and_the_start_of_another(folders, kind, tmp_path):
    """The stock pipeline, `load_student` and a run read it, with the modules that our adapters have not."""
    lora = write_lora(make_pipeline(kind), tmp_path / "x.safetensors", 3, FURTHER[kind], ranks={"to_q": 5})
    networks = begin(folders(kind), lora)
    found = answer(networks.teacher, networks.student)
    networks.teacher.save_student(networks.student, networks.scheduler, None, tmp_path / "student")
    same(found, answer(networks.teacher, stock(folders(kind), tmp_path / "student" / ADAPTER)))
    same(found, answer(networks.teacher, network_of(load_student(tmp_path / "student", networks.teacher))))
    further = begin(folders(kind), tmp_path / "student")
    same(found, answer(further.teacher, further.student))


@pytest.mark.parametrize("flow", others_slow(FLOWS, "sd3", "flux", "zimage"))
def test_the_weights_of_every_flow_change_as_in_its_stock_pipeline(flow, tmp_path):
    """By a LoRA of all linear maps, of which nothing depends on those without a gradient."""
    pipeline = make_flow(flow)
    network, teacher = network_of(pipeline), load_teacher(pipeline)
    further = [name for name, each in network.named_modules() if isinstance(each, torch.nn.Linear)]
    lora = write_lora(make_flow(flow), tmp_path / "lora.safetensors", 3, further)
    config = HSIVIConfig(2, init_from=str(lora), prompts=PROMPTS, guidance_scale=2.0)
    student, _ = make_student_and_critic(teacher, config)
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    wanted, found = changes(network), changes(student)
    assert wanted.keys() - found.keys() == {*idle_names(network, teacher.adapter)}
    torch.testing.assert_close(found, {name: wanted[name] for name in found})


def changes(network):
    """By module, what an adapter adds to its weight."""
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, LoraLayer)}
    return {name: layer.get_delta_weight(layer.active_adapters[0]).detach() for name, layer in layers.items()}


def test_names_of_original_sdxl_are_read_too(folders, tmp_path):
    """kohya's of SDXL, by the blocks of its first code, which only the config of the UNet tells apart."""
    weights = {"lora_unet_input_blocks_1_1_proj_in.lora_down.weight": torch.randn(2, 8, 1, 1)}
    weights["lora_unet_input_blocks_1_1_proj_in.lora_up.weight"] = torch.randn(8, 2, 1, 1)
    weights["lora_unet_input_blocks_1_1_proj_in.alpha"] = torch.tensor(1.0)
    save_file(weights, tmp_path / "lora.safetensors")
    networks = begin(folders("sdxl"), tmp_path / "lora.safetensors")
    teacher = networks.teacher
    same(answer(teacher, networks.student), answer(teacher, stock(folders("sdxl"), tmp_path / "lora.safetensors")))
    assert not torch.equal(answer(teacher, networks.student), answer(teacher, teacher.network))


def test_a_lora_is_read_without_the_weights_of_the_teacher(folders, tmp_path):
    """As a plan does, which counts what is trained."""
    lora = write_lora(make_text("sd"), tmp_path / "lora.safetensors", 70)
    config = HSIVIConfig(2, prompts=PROMPTS, guidance_scale=2.0, init_from=str(lora))
    with torch.device("meta"):
        known = read_teacher(str(folders("sd")))
        student, _ = make_student_and_critic(known, config)
    assert {weight.device.type for weight in student.parameters()} == {"meta"}
    assert rank_of(student) == 70


def test_factors_are_not_rounded_to_the_precision_of_the_teacher(folders, tmp_path):
    lora = write_lora(make_text("sd"), tmp_path / "lora.safetensors", 4, alpha=4.0)
    teacher = load_teacher(str(folders("sd")))
    teacher.network.to(torch.bfloat16)
    config = HSIVIConfig(2, prompts=PROMPTS, guidance_scale=2.0, init_from=str(lora))
    student, _ = make_student_and_critic(teacher, config)
    read = of_file(load_file(lora), factor_names(teacher.network), "unet")
    state = get_peft_model_state_dict(student)
    assert state.keys() == read.keys()
    assert all(torch.equal(weight, read[name]) for name, weight in state.items())


# ----- a network -----


@pytest.mark.parametrize("subfolder", others_slow(["", "unet"], "unet"))
def test_a_network_is_the_start_of_a_copy(folders, hub, tmp_path, same_tensors, subfolder):
    network = network_of(make_text("sd"))
    with torch.no_grad():
        for weight in network.parameters():
            weight += torch.randn_like(weight) / 10
    network.save_pretrained(tmp_path / subfolder)
    hub.add_repo("bob/copy", {path.as_posix(): data for path, data in contents(tmp_path).items()})
    with signed_in(hub, tmp_path / "home"):
        for start in (tmp_path / subfolder, f"bob/copy/{subfolder}".removesuffix("/")):
            networks = begin(folders("sd"), start, lora_rank=0)
            assert same_tensors(networks.student.state_dict(), network.state_dict())
            assert same_tensors(networks.critic.state_dict(), networks.teacher.network.state_dict())


# ----- from the Hub -----


def test_a_file_and_a_repo_of_the_hub_are_fetched_once(loaded, small_lora, hub, tmp_path, same_tensors):
    """Afterwards nothing is asked for, and names that are not there are refused in one line."""
    hub.add_repo("bob/Hyper", {"Hyper-4.safetensors": small_lora.read_bytes()})
    hub.add_repo("bob/lcm-lora", {ADAPTER: small_lora.read_bytes()})
    local = read_lora(loaded, str(small_lora))
    for offline in (False, True):
        with signed_in(hub, tmp_path / "home", offline):
            for name in ("bob/Hyper/Hyper-4.safetensors", "bob/lcm-lora"):
                assert same_tensors(read_lora(loaded, name), local)
            for name in ("bob/Hyper", "bob/Hyper/Hyper-8.safetensors", "bob/nothing"):
                with pytest.raises(ValueError, match=f"init_from='{name}' cannot be read") as refused:
                    begin(loaded, name)
                assert "\n" not in str(refused.value)


# ----- refusals -----


def test_a_mistyped_start_is_refused_before_a_teacher_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "lora").mkdir(parents=True)
    (tmp_path / "runs" / "lora" / "fast.safetensors").touch()
    for name in ("runs/lora", "runs/lora/fast.safetensors", "user/name", "user/name/fast.safetensors"):
        check_start(name)
    mistyped = {
        "lora": "is no folder here",
        "./none.safetensors": "is no folder here",
        "runs/loras": "did you mean runs/lora[?]",
        "runs/lora/past.safetensors": "the folder runs/lora has no such file",
        str(tmp_path / "none.safetensors"): "is no folder here",
    }
    for name, message in mistyped.items():
        with pytest.raises(ValueError, match=rf"init_from='{name}' cannot be read .*{message}.*: give the folder of a"):
            check_start(name)


def broken(path):
    path.write_bytes(path.read_bytes()[:-8])
    return path


def changed(path, weights):
    save_file({**load_file(path), **weights}, path)
    return path


def pair(module):
    return {f"{module}.lora_{each}.weight": torch.ones(2, 2) for each in ("down", "up")}


def without(path, factor):
    """A file in the notation of peft that lacks one of its weights."""
    pipeline = make_text("sd")
    pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name="default")
    weights = {f"unet.{name}": weight for name, weight in get_peft_model_state_dict(pipeline.unet).items()}
    del weights[next(name for name in weights if factor in name)]
    save_file(weights, path)
    return path


NAN = {"lora_unet_up_blocks_1_attentions_0_proj_in.lora_up.weight": torch.full((8, 4, 1, 1), torch.nan)}
UNREAD = r"init_from=.* cannot be read \(\w+: .*\): give the folder of a finished run; or a LoRA of such a network"


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda path: path.parent / "none.safetensors", {}, UNREAD),
        (lambda path: path.parent, {}, UNREAD),
        (broken, {}, UNREAD),
        (
            lambda path: changed(path, pair("lora_te_text_model_encoder_layers_0_self_attn_q_proj")),
            {},
            r"lacks weights of its LoRA, or has others than those of the teacher's unet: 2 of \d+, such as text",
        ),
        (
            lambda path: changed(path, pair("lora_unet_conv_far")),
            {},
            r"lacks weights of its LoRA, or has others .*: 2 of \d+, such as .*: give",
        ),
        (lambda path: write_lora(make_text("sdxl"), path, 2), {}, UNREAD),
        (lambda path: write_lora(make_pipeline("sd3"), path, 2), {}, "has others than those of the teacher's unet"),
        (lambda path: changed(path, NAN), {}, "has 1 weights that are not finite, such as unet.up_blocks.1.att"),
        (lambda path: without(path, "lora_A"), {}, "lacks weights of its LoRA, or has others .*: 1 of "),
        (lambda path: without(path, "lora_B"), {}, "lacks weights of its LoRA, or has others .*: 1 of "),
        (lambda path: path, {"lora_rank": 2}, "has a LoRA of rank 4, and lora_rank=2: leave that out"),
        (lambda path: path, {"lora_rank": 0}, UNREAD),
    ],
)
def test_what_cannot_be_the_start_is_refused_in_one_line(loaded, small_lora, tmp_path, capfd, make, settings, message):
    start = make(Path(shutil.copy(small_lora, tmp_path)))
    with pytest.raises(ValueError, match=message) as refused:
        begin(loaded, start, **settings)
    assert "\n" not in str(refused.value)
    assert not [line for line in capfd.readouterr().err.split("\n") if line and "it/s" not in line]


def test_a_network_of_another_shape_is_refused(folders, teacher, tmp_path):
    network_of(make_text("sdxl")).save_pretrained(tmp_path / "sdxl")
    for folder in (folders("sd"), teacher):
        with pytest.raises(ValueError, match=UNREAD):
            begin(folder, tmp_path / "sdxl", lora_rank=0)

"""What a run would cost, told before it starts: by updates of its very loop, on tensors that have no memory.

The networks are made from their configs, without weights, as fake tensors of torch, which know their shape and no
numbers. `Meter` adds up what would be alive at each moment; only time is measured on real ones, on a single network.
"""

from __future__ import annotations

import gc
import math
import os
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..scheduling_hsivi import HSIVIScheduler
from .config import Options
from .denoisers import sample_shape
from .student import LayerNoiseScale
from .trainer import HALF, Players, make_networks

MIB = 2**20
CALIBRATION_FLOPS = 2e11  # about what the calls may cost that the speed is taken from


class Meter(TorchDispatchMode):
    """Counts the bytes of the fake tensors that are alive, beside a `FakeTensorMode`.

    Indices, levels and other small numbers stay real, so that the loop takes the branches it would take.

    Attributes:
        now: Bytes alive.
        peak: The most that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return True  # of a loss: it is finite
        if _is_small(func, args, kwargs or {}) if not tensors else not any(isinstance(x, FakeTensor) for x in tensors):
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_leaves(result) if isinstance(leaf, FakeTensor))
        return result

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Counts their storages from now on, until they are gone; one that is counted already is not counted twice."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.alive:
                self.alive[storage._cdata] = weakref.ref(storage, partial(self._drop, storage._cdata, storage.nbytes()))
                self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int, _: Any) -> None:
        del self.alive[key]
        self.now -= size


def _is_small(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tells whether a new tensor holds indices, or one number for each row."""
    aten = torch.ops.aten
    if func.overloadpacket in (aten.randint, aten.randperm, aten.arange, aten.linspace):
        return True
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return not dtype.is_floating_point or (bool(args) and isinstance(args[0], list | torch.Size) and len(args[0]) < 2)


@dataclass(frozen=True)
class Cost:
    """What a layer update, with the critic's in it, needs in one process.

    Attributes:
        parameters: Numbers in each network.
        memory: Bytes by use; together they are the peak.
        calls: Network calls of student, critic and teacher for each row of the batch.
        flops: Floating-point operations.
        call_flops: Those of a call of one network for one row, without a gradient.
        written: Bytes of each thing that is saved.
    """

    parameters: dict[str, int]
    memory: dict[str, int]
    calls: dict[str, float]
    flops: float
    call_flops: float
    written: dict[str, int]


def read_configs(name: str, revision: str | None) -> tuple[dict[str, Any], HSIVIScheduler]:
    """Reads the configs of the UNet and of the scheduler of a pipeline; its weights are not asked for.

    Raises:
        ValueError: There are none.
    """
    configs: list[dict[str, Any]] = []
    for part, kind in (("unet", UNet2DModel), ("scheduler", HSIVIScheduler)):
        for subfolder in (part, None):  # the repos google/ddpm-* have all in one folder
            try:
                configs.append(kind.load_config(name, subfolder=subfolder, revision=revision))
                break
            except (OSError, ValueError) as error:
                cause = error
        else:
            raise ValueError(
                f"--pretrained_teacher_model {name} has no config of a {part} ({cause}): give a folder or repo id of a "
                "diffusers pipeline with a UNet2DModel"
            )
    if configs[0].get("_class_name") != "UNet2DModel":
        raise ValueError(
            f"--pretrained_teacher_model {name} has a unet of type {configs[0].get('_class_name')}: a UNet2DModel is "
            "needed"
        )
    return configs[0], HSIVIScheduler.from_config(configs[1])


def make_unet(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> UNet2DModel:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return UNet2DModel.from_config(config)
    finally:
        torch.set_default_dtype(before)


def make_fake_players(options: Options, meter: Meter) -> Players:
    """The players of the run without weights; to be called within a `FakeTensorMode`."""
    with meter:  # which leaves the schedule its numbers
        config, schedule = read_configs(str(options.teacher.pretrained_teacher_model), options.teacher.revision)
    half = precision_of(options) != "no"  # the two are of one size
    accelerator = Accelerator(cpu=True, device_placement=False, mixed_precision="bf16" if half else "no")
    unets = (make_unet(config, torch.bfloat16 if half else torch.float32), make_unet(config), make_unet(config))
    with meter:
        networks = make_networks(unets, schedule, options)
    if options.method.train_data is not None:
        networks.data = partial(_stand_in, sample_shape(unets[0]))
    if isinstance(networks.noise_scale, LayerNoiseScale):  # so small that the meter left it real
        networks.noise_scale.log_scale = nn.Parameter(torch.empty(networks.noise_scale.log_scale.shape))
    meter.add(parameter for unet in unets for parameter in unet.parameters())
    with meter:
        return Players(networks, options, accelerator)


def _stand_in(shape: tuple[int, int, int], size: int, condition: Tensor | None, generator: Any) -> Tensor:
    """In the place of real pictures, which a plan does not load."""
    return torch.randn(size, *shape)


def measure(options: Options) -> Cost:
    """Runs the loop on fake tensors: two steps with one critic update, and one with two; the rest is as many more."""
    libraries = psutil.Process().memory_info().rss
    updates = options.method.critic_updates
    pairs = options.method.ode_pairs
    options = options._replace(
        method=replace(options.method, critic_updates=1, ode_pairs=0),
        training=replace(options.training, critic_first=0),  # in these the layers' optimizer has no moments yet
    )
    counts: list[dict[str, float]] = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        meter = Meter()
        players = make_fake_players(options, meter)
        with meter:
            for step, critic_updates in enumerate([1, 1, min(updates, 2)]):
                options.method.critic_updates = critic_updates
                with _counting(players) as count:
                    next(players.updates(step))
                gc.collect()
                counts.append(count)
            peak = meter.peak
            with _counting(players) as call, torch.no_grad():
                no_level = torch.zeros(1, dtype=torch.long)
                classes = no_level if players.bridge.network.unet.config.num_class_embeds else None
                players.bridge.score(torch.randn(1, *players.bridge.shape), no_level, classes)
        _, one, two = counts
    total = {name: one[name] + (updates - 1) * (two[name] - one[name]) for name in one}
    rows = options.training.train_batch_size * options.hardware.gradient_accumulation_steps
    static = _static(players)
    return Cost(
        parameters={
            "each network": _numel(players.bridge.network),
            "student, with its noise scale": _numel(players.student),
        },
        memory={
            **static,
            "activations and gradients": peak - sum(static.values()),
            "libraries": libraries,
            **({"pairs": 2 * 4 * pairs * math.prod(players.bridge.shape)} if pairs else {}),
        },
        calls={name: total[name] / rows for name in ("student", "critic", "teacher")},
        flops=total["flops"],
        call_flops=call["flops"],
        written=_written(static, options.run.checkpoints_total_limit),
    )


@contextmanager
def _counting(players: Players) -> Iterator[dict[str, float]]:
    """Counts the rows that each network is called with, and the operations."""
    count: dict[str, float] = {}
    with players.counting_rows() as rows, FlopCounterMode(display=False) as flops:
        yield count
    count.update(rows, flops=float(flops.get_total_flops()))


def _static(players: Players) -> dict[str, int]:
    """Bytes that stay from update to update."""
    moments = [
        value
        for optimizer in (players.layer_optimizer, players.critic_optimizer)
        for state in optimizer.state.values()
        for value in state.values()
    ]
    return {
        "teacher": _bytes(players.bridge.network.parameters()),
        "student": _bytes(players.student.parameters()),
        "critic": _bytes(players.critic.parameters()),
        "average of the student": _bytes(players.ema.shadow_params),
        "Adam's moments": _bytes(moments),
        "chains": _bytes(tensor for chain in players.chains for tensor in chain.state_dict().values()),
    }


def _written(static: dict[str, int], limit: int) -> dict[str, int]:
    """Bytes of what a run leaves behind."""
    checkpoint = sum(size for name, size in static.items() if name != "teacher")
    return {
        "pipeline": static["student"],
        "critic": static["critic"],
        f"{limit} checkpoints": limit * checkpoint,
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def precision_of(options: Options) -> str:
    """The precision of the run: that of the launcher where the options name none."""
    return options.hardware.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def seconds_per_flop(options: Options) -> tuple[float, str]:
    """Times a call of one real network of random weights; returns its speed and the device.

    As many rows of the batch are used as the calls may cost, so that a small network is timed in the batch it gets.
    """
    config, _ = read_configs(str(options.teacher.pretrained_teacher_model), options.teacher.revision)
    device = torch.device("cpu")
    if torch.accelerator.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        device = torch.accelerator.current_accelerator() or device
    half = HALF.get(precision_of(options), torch.float32)
    unet = make_unet(config).to(device).eval()

    def call(rows: int) -> float:
        classes = unet.config.num_class_embeds
        x = torch.randn(rows, *sample_shape(unet), device=device)
        labels = torch.zeros(rows, dtype=torch.long, device=device) if classes else None
        begin = time.perf_counter()
        with torch.no_grad(), torch.autocast(device.type, half, enabled=half != torch.float32):
            float(unet(x, 0, class_labels=labels).sample.sum())  # a number, for which a GPU must have finished
        return time.perf_counter() - begin

    with FlopCounterMode(display=False) as counter:
        call(1)
    flops = counter.get_total_flops()
    rows = int(min(options.training.train_batch_size, max(1, CALIBRATION_FLOPS // flops)))
    return min(call(rows) for _ in range(3)) / (rows * flops), _device_name(device)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} thread(s)" if device.type == "cpu" else device.type


def print_plan(options: Options) -> None:
    """Prints what a run of these options would cost; with several processes, the first of them does."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if int(os.environ.get("RANK", 0)) > 0:
        return
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):  # from here on it is alone
        os.environ.pop(name, None)
    cost = measure(options)
    if processes > 1:
        trained = cost.memory["student"] + cost.memory["critic"]
        cost.memory["gradient buckets of data parallelism"] = trained
        if "pairs" in cost.memory:
            cost.memory["pairs"] //= processes
    print("\n".join(describe(options, cost, *seconds_per_flop(options), processes)))


def describe(options: Options, cost: Cost, speed: float, device: str, processes: int) -> list[str]:
    """The lines of the plan."""
    training, hardware = options.training, options.hardware
    rows = training.train_batch_size * hardware.gradient_accumulation_steps
    seconds = speed * cost.flops
    calls = ", ".join(f"{name} {number:.1f}" for name, number in cost.calls.items())
    layers = ", ".join(map(str, options.layers.num_layers))
    return [
        f"{options.teacher.pretrained_teacher_model}, T = {layers}, preset {options.method.preset}: "
        f"{training.max_train_steps} updates of {rows * processes} rows in {processes} process(es)",
        "",
        *_table("parameters", cost.parameters, 1, ",.0f"),
        "",
        *_table("memory of a process, MiB", cost.memory, MIB, ",.1f"),
        f"  {'in all, at the peak':40s}{sum(cost.memory.values()) / MIB:>16,.1f}",
        "  (libraries, of this process, and pairs are in main memory; the rest is on the device)",
        *(
            ["  (the pictures of --train_data stay in main memory and come on top)"]
            if options.method.train_data
            else []
        ),
        "",
        f"an update calls for each row: {calls}; {cost.flops / 1e9:,.1f} GFLOP in a process",
        f"about {seconds:,.2f} s an update and {_duration(seconds * training.max_train_steps)} in all on {device}, by "
        "the speed of one network",
        *_pair_lines(options, cost, speed, processes),
        "",
        *_table("written, MiB", cost.written, MIB, ",.1f"),
    ]


def _pair_lines(options: Options, cost: Cost, speed: float, processes: int) -> list[str]:
    """What the pairs and the fit to them cost before the updates: a backward pass is two calls."""
    method, hardware = options.method, options.hardware
    if not method.ode_pairs:
        return []
    rows = options.training.train_batch_size * hardware.gradient_accumulation_steps
    made, fitted = method.ode_pairs * method.ode_calls / processes, 3 * method.ode_steps * rows
    return [
        f"before them about {_duration(speed * cost.call_flops * (made + fitted))} for {method.ode_pairs:,} pairs of "
        f"{method.ode_calls} calls of the teacher and {method.ode_steps:,} updates of the layers by them"
    ]


def _table(title: str, numbers: Mapping[str, float], unit: float, form: str) -> list[str]:
    return [title, *(f"  {name:40s}{format(number / unit, form):>16s}" for name, number in numbers.items())]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"

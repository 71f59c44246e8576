"""Estimates memory and time by running a few updates on tensors without values.

The networks are made from their configs, without weights, as `Hollow` tensors: they have a shape and no values. `Meter`
adds up what would be alive at each moment; time alone is measured on real tensors, on a single network, or
estimated for a card of `CARDS`.
"""

from __future__ import annotations

import gc
import math
import os
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, in_kernel_invocation_manager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..teachers.adapters import has_adapter
from ..teachers.guidance import Guided
from ..teachers.loading import read_teacher
from ..teachers.teacher import Teacher, check_prompts
from ..vi import ConditionalLayers, DiagonalGaussian
from .cards import COMPUTE, LAUNCH, TRAFFIC, Card, Work, find_card
from .config import HSIVIConfig
from .networks import HALF, make_networks, make_student_and_critic
from .pairs import TeacherPairs
from .state import TrainingState, trained
from .updates import PAIR_STEPS, fit_calls, run_updates

MIB = 2**20
CALIBRATION_FLOPS = 2e11  # about what the calls may cost that the speed is taken from
IN_MAIN_MEMORY = ("libraries", "pairs")
MARGIN = 1.2  # of memory: measured peaks were up to 1.14 of planned ones, and a driver takes some
MOST_FLOPS = 1e12  # of a call that is timed on a CPU

ONE_UPDATE: dict[str, Any] = {"critic_first": 0, "max_train_steps": 2}  # of a run, alone

CPU, META = torch.device("cpu"), torch.device("meta")

_aten = torch.ops.aten
_device = torch.ops.prim.device.default
FLOPS = {  # those of attention on the CPU, too, which torch leaves out
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}


class Hollow(Tensor):
    """A meta tensor that passes for one on the CPU, so that autocast and autograd do as with a real one."""

    @staticmethod
    def __new__(cls, meta: Tensor) -> Hollow:
        return Tensor._make_subclass(cls, meta, dispatch_device=True, device_for_backend_keys=CPU)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is not _device:
            raise NotImplementedError(f"{func} on tensors without values: do it within a Meter")
        return META if torch._C._meta_in_tls_dispatch_include() else CPU  # inside of a kernel, and outside

    def tolist(self) -> list[Any]:  # which torch refuses of other classes than its own
        return [each.item() for each in self]


class Counts(NamedTuple):
    """Of an operation."""

    operations: int
    traffic: int
    flops: int


class Meter(TorchDispatchMode):
    """Runs operations on `Hollow` tensors, and counts the bytes of those that are alive: `now`, and at the `peak`.

    It counts operations, too, their `flops`, and the `traffic`, the bytes that they read and write. Indices, levels and
    other small numbers stay real, so that the loop takes the branches it would take.

    What comes of an operation that makes new tensors is told by the fake tensors of torch, which are exact and slow:
    they are asked once for each kind of arguments.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = self.traffic = self.operations = 0
        self.alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.known: dict[Any, tuple[Any, Counts]] = {}
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _device:  # two thirds of all
            return Hollow.__torch_dispatch__(func, types, args)
        kwargs = kwargs or {}
        key = func, _describe((args, *kwargs.items()))
        if (known := self.known.get(key)) is not None:
            return self._note(_make(known[0]), known[1])
        tensors = [*_tensors((args, *kwargs.values()))]
        hollow = any(isinstance(x, Hollow) for x in tensors)
        if func is _aten._local_scalar_dense.default and hollow:
            return True  # of a loss: it is finite
        if not (hollow if tensors else _is_large(func, args, kwargs)):
            return func(*args, **kwargs)
        if _shares_storage(func):
            result = self._run_on_meta(func, args, kwargs)
            return self._note(result, _count(func, args, kwargs, result))
        result = self._run_on_fakes(func, args, kwargs)
        described, counts = self.known[key] = _describe(result), _count(func, args, kwargs, result)
        return self._note(_make(described), counts)

    def _run_on_meta(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs an operation whose result shares the storage of its arguments."""

        def hollow(x: Tensor) -> Tensor:
            return x if isinstance(x, Hollow) else Hollow(x.to(META))

        args, kwargs = _map(hollow, args), {name: _map(hollow, value) for name, value in kwargs.items()}
        with in_kernel_invocation_manager(self.fake):
            result = func(*args, **kwargs)
        return _map(hollow, result)

    def _run_on_fakes(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        def fake(x: Tensor) -> Tensor:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) if isinstance(x, Hollow) else x

        with self.fake:
            return func(*_map(fake, args), **{name: _map(fake, value) for name, value in kwargs.items()})

    def _note(self, result: Any, counts: Counts) -> Any:
        self.add(_tensors(result))
        self.operations += counts.operations
        self.traffic += counts.traffic
        self.flops += counts.flops
        return result

    def work(self) -> dict[str, int]:
        """Counts since the meter was made, by the names of `Work`."""
        return {name: getattr(self, name) for name in Work._fields}

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


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those of an operation's arguments, or of its result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _map(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Changes the tensors of an operation's arguments, or of its result."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_map(change, each) for each in value) if isinstance(value, list | tuple) else value


def _describe(value: Any) -> Any:
    """All that counts of an operation's arguments, or of its result; `_make` makes the latter again."""
    if isinstance(value, Tensor):
        return type(value), value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return list, tuple([_describe(each) for each in value])
    return type(value), value  # 1 is equal to 1.0


def _make(described: Any) -> Any:
    kind, *what = described
    if kind is list:
        return tuple([_make(each) for each in what[0]])
    if not issubclass(kind, Tensor):
        return what[0]
    shape, stride, dtype = what
    return Hollow(torch.empty_strided(shape, stride, dtype=dtype, device=META))


def _shares_storage(func: Any) -> bool:
    """Tells whether an operation changes tensors, or returns views of them."""
    return func is _aten._unsafe_view.default or any(each.alias_info for each in func._schema.arguments)


def _count(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> Counts:
    if any(each.alias_info and not each.alias_info.is_write for each in func._schema.returns):  # a view
        return Counts(0, 0, 0)
    count = FLOPS.get(func.overloadpacket)
    traffic = _bytes(_tensors((args, *kwargs.values(), result)))
    return Counts(1, traffic, count(*args, **kwargs, out_val=result) if count else 0)


def _is_large(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tells whether an operation makes a tensor that holds neither indices nor one number for each row."""
    if func.overloadpacket in (_aten.randint, _aten.randperm, _aten.arange, _aten.linspace):
        return False
    if not any(each.name == "device" for each in func._schema.arguments):
        return False
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    is_short = bool(args) and isinstance(args[0], list | torch.Size) and len(args[0]) < 2
    return dtype.is_floating_point and not is_short


@dataclass
class Cost:
    """What a layer update, with the critic's in it, needs in one process."""

    parameters: dict[str, int]  # numbers in each network
    memory: dict[str, int]  # bytes by use; together they are the peak
    calls: dict[str, float]  # of student, critic and teacher, for each row of the batch
    work: Work
    call: Work  # of a call of one network for one row, without a gradient
    fit_calls: tuple[int, int]  # before the updates, see `fit_calls`
    written: dict[str, int]  # bytes of each thing that is saved
    adapted: bool  # the student is an adapter, which is saved without the rest of the pipeline

    @property
    def on_device(self) -> int:
        """Bytes that a GPU holds; the rest is in main memory."""
        return sum(size for use, size in self.memory.items() if use not in IN_MAIN_MEMORY)


def make_teacher(name: str, revision: str | None, config: HSIVIConfig, dtype: torch.dtype = torch.float32) -> Teacher:
    """Makes a teacher of random weights, in a precision, from its configs alone, on the default device.

    It has the sizes of a run, and prompts that say nothing.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        teacher = read_teacher(name, revision)
    finally:
        torch.set_default_dtype(before)
    with torch.device("cpu"):  # which knows the numbers of the noise levels
        teacher.set_sizes(config)
        teacher.make_blank_prompts()
    return teacher


def make_players(name: str, revision: str | None, config: HSIVIConfig) -> tuple[Teacher, Any, Any]:
    """Makes the teacher of a run, its student and its critic, of random weights, in the precisions of the run."""
    teacher = make_teacher(name, revision, config, torch.bfloat16 if _is_half(config) else torch.float32)
    adapted = teacher.rank(config.lora_rank) > 0
    source = teacher if adapted else make_teacher(name, revision, config)
    student, critic = make_student_and_critic(source, config)
    teacher.check_students(config)
    return teacher, student, critic


def make_state(players: tuple[Teacher, Any, Any], config: HSIVIConfig, **settings: Any) -> TrainingState:
    """Makes the state of a run on the CPU, whose accelerator has these settings."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if _is_half(config) else "no", **settings)
    return TrainingState(make_networks(*players, config), config, accelerator)


def _is_half(config: HSIVIConfig) -> bool:
    return config.precision != "no"  # bf16 and fp16 are of one size


def make_hollow_state(name: str, revision: str | None, config: HSIVIConfig, meter: Meter) -> TrainingState:
    """Makes the state of the run without weights; its tensors are `Hollow`."""
    with torch.device("meta"):  # adapters cannot be added to hollow tensors
        teacher, student, critic = make_players(name, revision, config)
    with meter:
        _make_hollow([teacher.network, student, critic])
        return make_state((teacher, student, critic), config, device_placement=False)


def _make_hollow(networks: Sequence[nn.Module]) -> None:
    """Replaces meta tensors by hollow ones; networks that shared a tensor still do."""
    hollow: dict[int, Any] = {}
    for module in (part for network in networks for part in network.modules()):
        held: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in hollow:
                    empty = Hollow(tensor.detach())
                    is_weight = isinstance(tensor, nn.Parameter)
                    hollow[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
                tensors[name] = None if tensor is None else hollow[id(tensor)]


@contextmanager
def _collecting_often() -> Iterator[None]:
    """Lets no tensor wait long for the garbage collector, whose turn would depend on what else was made before."""
    usual = gc.get_threshold()
    gc.set_threshold(50, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def measure(name: str, revision: str | None, config: HSIVIConfig) -> Cost:
    """Runs an update on tensors without values, of two critic updates at most: the others are as many more.

    Before it chains are begun and optimizers have their moments, as after the first update of a run.
    """
    libraries = psutil.Process().memory_info().rss
    wanted, pairs = config.critic_updates, config.num_pairs
    shares = None if config.prompts else config.class_shares  # a plan has but one prompt
    config = replace(config, **ONE_UPDATE, critic_updates=min(wanted, 2), class_shares=shares)
    config.num_pairs = pairs  # of which short runs have fewer
    eight_bit, config.use_8bit_adam = config.use_8bit_adam, False  # bitsandbytes takes no hollow tensors
    with _collecting_often():
        meter = Meter()
        state = make_hollow_state(name, revision, config, meter)
        with meter:
            begin(state)
            total, further = _measure_update(state, meter)
            gc.collect()
            peak = meter.peak
            before = meter.work()
            with torch.no_grad():
                zero = torch.zeros(1, dtype=torch.long)
                classes = zero if state.bridge.num_classes else None
                lowest = state.bridge.scheduler.levels.time(zero)
                Guided(state.teacher)(torch.randn(1, *state.bridge.shape), lowest, classes)
            call = Counter(meter.work()) - Counter(before)
    for _ in range(wanted - config.critic_updates):
        total += further
    static, limit = _static(state, eight_bit), config.checkpoints_total_limit
    memory = {**static, "activations and gradients": peak - sum(_static(state).values()), "libraries": libraries}
    if config.num_pairs:
        memory["pairs"] = (1 + len(config.depths)) * 4 * config.num_pairs * math.prod(state.bridge.shape)
    parts = {"teacher": [*state.teacher.network.parameters()], "trained of the student": trained(state.student)}
    return Cost(
        parameters={name: sum(each.numel() for each in weights) for name, weights in parts.items()},
        memory=memory,
        calls={name: total[name] / _rows(config) for name in ("student", "critic", "teacher")},
        work=Work(*(total[name] for name in Work._fields)),
        call=Work(*(call[name] for name in Work._fields)),
        fit_calls=fit_calls(state),
        written={
            "pipeline": static["student"],
            "critic": static["critic"],
            f"{limit} checkpoints": limit * (sum(static.values()) - static["teacher"]),
        },
        adapted=has_adapter(state.student.network),
    )


def begin(state: TrainingState) -> None:
    """Fills the chains and makes pairs, without network calls, and makes the moments of both optimizers."""
    still = _Still()
    state.pairs = partial(_one_pair, state)
    for chain in state.chains:
        chain.draw(still)
    for optimizer in (state.layer_optimizer, state.critic_optimizer):
        for weight in (each for group in optimizer.param_groups for each in group["params"]):
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        optimizer.zero_grad()


def _one_pair(state: TrainingState, _: int) -> TeacherPairs:
    """Stands for all: what an update takes of them is as large."""
    scheduler, shape = state.bridge.scheduler, state.bridge.shape
    condition = torch.zeros(1, dtype=torch.long) if state.bridge.num_classes else None
    ends = torch.zeros(1, len(scheduler.depths), *shape)
    return TeacherPairs(scheduler, torch.zeros(1, *shape), ends, condition, device=state.teacher.device)


class _Still(ConditionalLayers):
    """Layers that cost no network call, and leave the mean where it is."""

    def forward(self, x_next: Tensor, t: Tensor, condition: Any = None) -> DiagonalGaussian:
        return DiagonalGaussian(x_next, torch.ones(1))


def _measure_update(state: TrainingState, meter: Meter) -> tuple[Counter[str], Counter[str]]:
    """Counts of an update, and those of its last critic update: work, and the rows that each network is called with."""
    with state.counting_rows() as rows:
        marks = [Counter(**meter.work(), **rows)]

        def mark(*_: Any) -> None:
            marks.append(Counter(**meter.work(), **rows))

        handle = state.critic_optimizer.optimizer.register_step_post_hook(mark)
        next(run_updates(state, 1))  # after the fit to pairs
        handle.remove()
        mark()
    return marks[-1] - marks[0], marks[-2] - marks[-3]


def _rows(config: HSIVIConfig) -> int:
    """Rows of an update in one process."""
    return config.train_batch_size * config.gradient_accumulation_steps


def _static(state: TrainingState, eight_bit: bool = False) -> dict[str, int]:
    """Bytes that stay from update to update; with `eight_bit` Adam's moments take 8 bits."""
    optimizers = (state.layer_optimizer, state.critic_optimizer)
    moments = (moment for each in optimizers for values in each.state.values() for moment in values.values())
    return {
        "teacher": _bytes(state.teacher.network.parameters()),
        "student": _bytes(trained(state.student)),
        "critic": _bytes(trained(state.critic)),
        "average of the student": _bytes(state.ema.shadow_params),
        "Adam's moments": sum(map(_eight_bit, moments)) if eight_bit else _bytes(moments),
        "chains": _bytes(tensor for chain in state.chains for tensor in chain.state_dict().values()),
    }


def _eight_bit(moment: Tensor) -> int:
    """Bytes of it by bitsandbytes: one a number, 4 for every 256; below 4,096 numbers it is kept whole."""
    number = moment.numel()
    return number + 4 * math.ceil(number / 256) if number >= 4096 else _bytes([moment])


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def seconds_per_flop(teacher: Teacher, config: HSIVIConfig, flops: float) -> tuple[float, str]:
    """Times calls of one real network of random weights, of `flops` a row; returns seconds per FLOP, and of what clock.

    On a CPU it is the CPU time of this process over its threads, so that other work on the machine does not count. As
    many rows of the batch are used as the calls may cost, so that a small network is timed in the batch it gets.
    """
    device, name = torch.device("cpu"), f"CPU time of this process measured alone, {torch.get_num_threads()} thread(s)"
    if torch.accelerator.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        device = torch.accelerator.current_accelerator() or device
        name = f"on GPU {torch.cuda.get_device_name(device)}" if device.type == "cuda" else f"on {device.type}"
    half = HALF.get(config.precision, torch.float32)
    teacher.network.to(device).eval()

    def clock() -> float:
        return time.process_time() / torch.get_num_threads() if device.type == "cpu" else time.perf_counter()

    def call(rows: int) -> float:
        x = torch.randn(rows, *teacher.shape, device=device)
        zeros = torch.zeros(rows, dtype=torch.long, device=device)
        labels = zeros if teacher.num_rows else None
        times = teacher.schedule.levels.time(zeros)
        begin = clock()
        with torch.no_grad(), torch.autocast(device.type, half, enabled=half != torch.float32):
            float(Guided(teacher)(x, times, labels).sum())  # a number, for which a GPU must have finished
        return clock() - begin

    rows = int(min(config.train_batch_size, max(1, CALIBRATION_FLOPS // flops)))
    call(rows)
    return min(call(rows) for _ in range(3)) / (rows * flops), name


def print_plan(
    teacher: str,
    config: HSIVIConfig,
    revision: str | None = None,
    card: str | None = None,
    price_per_hour: float | None = None,
) -> None:
    """Prints what a run would cost in one process; under a launcher the first one prints.

    Args:
        teacher: Folder or repo id of its pipeline.
        config: Of the run.
        revision: Of the repo.
        card: Name of a card of `CARDS`, to estimate the time for; else it is that of this machine.
        price_per_hour: Of the card, in any currency.

    Raises:
        ValueError: The card is not known, or is not made for the precision of the run; or a price has no card.
    """
    named = None if card is None else find_card(card)
    if named and config.precision == "bf16" and not named[1].has_bf16:
        raise ValueError(f"card={named[0]!r} is slow in bf16: give mixed_precision fp16")
    if price_per_hour is not None and not (named and 0 <= price_per_hour < math.inf):
        raise ValueError(f"price_per_hour={price_per_hour}: give a price from 0 on, and the card")
    if int(os.environ.get("RANK", 0)) > 0:
        return
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):  # accelerate would wait for the others
        os.environ.pop(name, None)
    print(f"planning {teacher} from its configs: no weights are loaded", file=sys.stderr, flush=True)
    with torch.device("meta"):
        known = make_teacher(teacher, revision, config)
    decoder = _bytes(known.decoder_weights())
    check_prompts(known.takes_text, config.prompts)
    cost = measure(teacher, revision, config)
    if decoder:
        pipeline = cost.written["pipeline"] + (0 if cost.adapted else decoder)
        memory, written = {**cost.memory, "VAE": decoder}, {**cost.written, "pipeline": pipeline}
        cost = replace(cost, memory=memory, written=written)
    calls = ", ".join(f"{name} {number:.1f}" for name, number in cost.calls.items())
    lines = [
        f"{teacher}, {', '.join(map(str, config.depths))} steps, preset {config.preset}: "
        f"{config.max_train_steps} updates of {_rows(config)} rows",
        "",
        *_table("parameters", cost.parameters, 1, ",.0f"),
        "",
        *_table("memory of a process, MiB", cost.memory, MIB, ",.1f"),
        f"  {'in all, at the peak':40s}{sum(cost.memory.values()) / MIB:>16,.1f}",
        f"  {'of that in main memory':40s}{(sum(cost.memory.values()) - cost.on_device) / MIB:>16,.1f}",
        f"  {'of that on the device':40s}{cost.on_device / MIB:>16,.1f}",
        *(["  (shard_base leaves 1/N of the teacher in each of the N processes of a machine)"] * config.shard_base),
        "",
        f"an update calls for each row: {calls}; {cost.work.flops / 1e9:,.1f} GFLOP in a process",
        *(_card_lines(*named, price_per_hour, config, cost) if named else _time_lines(teacher, revision, config, cost)),
        "",
        *_table("written, MiB", cost.written, MIB, ",.1f"),
    ]
    print("\n".join(lines))


def _time_lines(teacher: str, revision: str | None, config: HSIVIConfig, cost: Cost) -> list[str]:
    """What the updates take, and what comes before them; without a GPU not of a network that would take minutes."""
    if cost.call.flops > MOST_FLOPS and not torch.accelerator.is_available():
        return [
            f"a call of the teacher takes {cost.call.flops / 1e12:,.1f} TFLOP: plan on the GPU to know the time, or "
            "name one, such as --card H100"
        ]
    speed, clock = seconds_per_flop(make_teacher(teacher, revision, config), config, cost.call.flops)
    seconds = speed * cost.work.flops
    return [
        f"about {seconds:,.2f} s an update and {_duration(seconds * config.max_train_steps)} in all, by the speed of "
        f"one network ({clock})",
        *_fit_line(config, cost.fit_calls, speed * cost.call.flops),
    ]


def _card_lines(name: str, card: Card, price: float | None, config: HSIVIConfig, cost: Cost) -> list[str]:
    """The same on a card that is not here, with what it costs and whether the memory is enough."""
    half, rows = config.precision != "no", _rows(config)
    seconds = card.seconds(cost.work, half)
    batch = Work(rows * cost.call.flops, rows * cost.call.traffic, cost.call.operations)
    call, (made, fitted) = card.seconds(batch, half) / rows, cost.fit_calls
    total = seconds * config.max_train_steps + call * (made + 3 * fitted)
    money = "" if price is None else f"; all costs {price * total / 3600:,.2f} at {price:g} an hour"
    needed, there = cost.on_device / MIB, 1024 * card.memory
    room = "it fits" if MARGIN * needed < there else "it may not fit" if needed < there else "it does not fit"
    remedy = "" if MARGIN * needed < there else ": take a smaller batch, --gradient_checkpointing, or another card"
    verdict = f"  {needed:,.0f} MiB of its {there:,} are planned: {room}{remedy}"
    return [
        f"{name}: about {seconds:,.2f} s an update and {_duration(seconds * config.max_train_steps)} for all{money}",
        *_fit_line(config, cost.fit_calls, call),
        f"  (assumed: {COMPUTE:.0%} of {card.half if half else card.single:g} TFLOP/s, without TF32, {TRAFFIC:.0%} of "
        f"{card.bandwidth:,} GB/s, and at least {1e6 * LAUNCH:.0f} microseconds for each of "
        f"{cost.work.operations:,.0f} operations)",
        *([] if config.shard_base else [verdict]),
    ]


def _fit_line(config: HSIVIConfig, calls: tuple[int, int], seconds: float) -> list[str]:
    """What comes before the updates, if there are pairs; a call takes so long, and a backward pass is two."""
    if not config.num_pairs:
        return []
    made, fitted = calls
    what = f"{config.num_pairs:,} pairs in {made:,} calls of the teacher"
    what += f" and {PAIR_STEPS:,} updates of the layers alone" * bool(fitted)
    return [f"before them about {_duration(seconds * (made + 3 * fitted))} for {what}"]


def _table(title: str, numbers: Mapping[str, float], unit: float, form: str) -> list[str]:
    return [title, *(f"  {name:40s}{format(number / unit, form):>16s}" for name, number in numbers.items())]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"

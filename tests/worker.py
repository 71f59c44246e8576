"""Runs `hsivi distil` in forked children, which may be killed; imports once, so that a run starts in no time.

Reads a request of JSON on each line of its input: `arguments`, `processes`, `environment`, and `kill`. That is null, or
{"after": seconds}, for SIGKILL from here, or {"point": ..., "step": ...}, for a child that kills itself while it saves
the checkpoint of a step (see POINTS) or, if the point is the name of a signal, sends itself that after a step, or, if
it is "making pairs", SIGTERM before so many batches of pairs, or, if it is "collapse", has a student that draws black,
or, if it is "see damage", takes that checkpoint for damaged. Answers with the exit statuses of the children, minus the
signal where there was one, and with the last lines that each printed.
"""

import json
import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hsivi_diffusers.commands import cli
from hsivi_diffusers.distillation import pairs, progress, state, updates
from hsivi_diffusers.runs import checkpoints, folders, state_dicts

updates.PAIR_STEPS = 3  # as in the runs of the fixtures
PATIENCE = 600  # seconds that a run may take
GRACE = 1  # seconds that the other children have after one died

# Function before which the child dies, and the path it is called with.
POINTS = {
    "state": (state, "save_tensors", r"partial-{step}/chains"),  # the parts are saved
    "half a file": (state, "save_tensors", r"partial-{step}/chains"),
    "half a part": (state_dicts, "save_file", r"partial-{step}/average"),
    "chains": (checkpoints, "write_json", r"partial-{step}/progress.json$"),
    "progress": (checkpoints, "replace_folder", r"partial-{step}$"),
    "between retire and rename": (folders.os, "replace", r"partial-{step}$"),
    "renamed": (checkpoints, "remove_folder", r"checkpoint-\d+$"),
    "half removed": (folders.shutil, "rmtree", r"checkpoint-\d+.retired$"),
    "ends of pairs": (state, "write_ends", r"pairs/"),
    "pipeline": (folders.os, "replace", r"pipeline.partial$"),
}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arrange_death(point, step):
    """Makes this process kill itself at a point of the checkpoint of a step."""
    module, name, pattern = POINTS[point]
    function, pattern = getattr(module, name), pattern.format(step=step)

    def dying(*given, **named):
        paths = [path for path in given if isinstance(path, str | Path) and re.search(pattern, str(path))]
        if paths and os.path.exists(paths[0]) >= (point == "half removed"):
            if point.startswith("half a "):
                function(*given, **named)
                os.truncate(paths[0], os.path.getsize(paths[0]) // 2)
            if point == "half removed":
                for file in sorted(paths[0].iterdir())[::2]:
                    file.unlink()
            die()
        return function(*given, **named)

    setattr(module, name, dying)


def send_signal(name, step):
    """Has this process send itself a signal after a step."""
    fit = updates.fit

    def signalled(*given, **named):
        for done in fit(*given, **named):
            if done.step + 1 == step:
                os.kill(os.getpid(), signal.Signals[name])
            yield done

    updates.fit = signalled


def stop_pairs(name, step):
    """Has this process send itself SIGTERM before a batch of pairs."""
    solver_states, left = pairs.solver_states, [step]

    def counting(*given, **named):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return solver_states(*given, **named)

    pairs.solver_states = counting


def collapse(name, step):
    """Has the student of this process draw black."""
    columns = progress.COLUMNS
    progress.Progress._draw_student = lambda run, size: 0 * run._teacher_row.repeat(size // columns, 1, 1, 1)


def see_damage(name, step):
    """Has this process read damage in the checkpoint of a step."""
    find = checkpoints.find_damage
    checkpoints.find_damage = lambda path: "damaged" if path.name == f"checkpoint-{step}" else find(path)


def start(rank, request, port, log):
    """Forks a child that runs `hsivi distil` as one of the processes of a launcher."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        os.environ |= request["environment"]
        if request["processes"] > 1:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(request["processes"])}
        kill = request["kill"] or {}
        if "point" in kill and rank == kill.get("rank", 0):
            acts = {**dict.fromkeys(signal.Signals.__members__, send_signal), "collapse": collapse}
            acts |= {"making pairs": stop_pairs, "see damage": see_damage}
            act = acts.get(kill["point"], arrange_death)
            act(kill["point"], kill["step"])
        cli.distil(request["arguments"])
        status = 0
    except SystemExit as exit:
        print(exit.code, flush=True)
        status = exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(request):
    """Starts the processes of a run, kills them if told to, and waits for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(request["processes"])]
        statuses = wait([start(rank, request, port, log) for rank, log in enumerate(logs)], request["kill"] or {})
        return {"statuses": statuses, "texts": [log.seek(0) or log.read().decode()[-3000:] for log in logs]}


def wait(children, kill):
    """Returns the exit statuses of the children; has none live on long when one of them has failed."""
    statuses, end = {}, time.monotonic() + kill.get("after", PATIENCE)
    while len(statuses) < len(children):
        for child in set(children) - statuses.keys():
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                statuses[child] = os.waitstatus_to_exitcode(status)
                end = min(end, time.monotonic() + (GRACE if statuses[child] else PATIENCE))
        if time.monotonic() > end:
            left = sorted(set(children) - statuses.keys())
            for child in random.sample(left, len(left)):
                os.kill(child, signal.SIGKILL)
            end = float("inf")
        time.sleep(0.002)
    return [statuses[child] for child in children]


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)

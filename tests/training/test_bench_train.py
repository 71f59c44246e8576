import json
import time

import pytest

from training.benchmarks.images import bench_train as script

FILES = {"bench.json", "bench.md", "bench.png"}


@pytest.fixture(scope="module")
def arguments(teacher, extractor):
    """A benchmark of a second or two."""

    def make(output_dir, *more):
        return [
            f"--output_dir={output_dir}",
            f"--pretrained_teacher_model={teacher}",
            f"--feature_extractor={extractor}",
            "--train_batch_size=4",
            "--num_samples=16",
            "--turns=1",
            *["--num_layers", "2", "--seeds", "0", "--paper_seconds", "0.2", "0.4", "--fast_seconds", "0.1", "0.4"],
            *more,
        ]

    return make


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """A finished benchmark: to be read, not written to."""
    folder = tmp_path_factory.mktemp("bench") / "finished"
    script.main(arguments(folder))
    return folder


@pytest.fixture
def state(finished):
    return json.loads((finished / "bench.json").read_text())


@pytest.fixture
def parts_run(monkeypatch):
    """Names of the functions that were called to train or to compare costs."""
    calls = []

    def count(name):
        work = getattr(script, name)
        monkeypatch.setattr(script, name, lambda *args: calls.append(name) or work(*args))

    count("run")
    count("compare_costs")
    return calls


def test_it_runs_each_part_once_and_writes_table_and_picture(finished, state):
    assert {path.name for path in finished.iterdir()} == FILES
    assert list(state["runs"]) == [
        "T 2, seed 0, costs",
        "T 2, seed 0, paper",
        "T 2, seed 0, fast 0.1 s",
        "T 2, seed 0, fast 0.4 s",
    ]
    text = (finished / "bench.md").read_text()
    assert "| 2 | 0 |" in text
    assert "| 2 | mean |" in text
    assert "| 2 | `paper` |" in text
    assert (finished / "bench.png").stat().st_size > 10_000


def test_paper_is_measured_at_its_marks_and_a_fast_run_at_its_end(state):
    paper = state["runs"]["T 2, seed 0, paper"]["points"]
    assert 1 <= len(paper) <= 2
    assert paper[-1]["cpu_seconds"] >= 0.4
    for seconds in ("0.1", "0.4"):
        (point,) = state["runs"][f"T 2, seed 0, fast {seconds} s"]["points"]
        assert point["seconds"] > 0
        assert point["fd"] > 0


def test_every_line_of_a_table_has_as_many_cells_as_its_heading(finished):
    parts = (finished / "bench.md").read_text().split("\n\n")
    tables = [part.split("\n") for part in parts if part.startswith("| T")]
    assert len(tables) == 2
    for lines in tables:
        assert {line.count("|") for line in lines} == {lines[0].count("|")}


def test_it_goes_on_where_it_stopped(finished, state, arguments, tmp_path, parts_run):
    stopped = {**state, "runs": dict(list(state["runs"].items())[:-1])}
    (tmp_path / "bench.json").write_text(json.dumps(stopped))
    script.main(arguments(tmp_path))
    assert parts_run == ["run"]
    after = json.loads((tmp_path / "bench.json").read_text())["runs"]
    assert list(after) == list(state["runs"])
    assert {name: after[name] for name in stopped["runs"]} == stopped["runs"]


def test_a_finished_one_is_only_reported_again(finished, state, arguments, tmp_path, parts_run):
    (tmp_path / "bench.json").write_text(json.dumps(state))
    script.main(arguments(tmp_path))
    assert parts_run == []
    assert (tmp_path / "bench.md").read_text() == (finished / "bench.md").read_text()


def test_more_runs_of_fast_can_be_asked_for_later(state, arguments, tmp_path, parts_run):
    (tmp_path / "bench.json").write_text(json.dumps(state))
    script.main(arguments(tmp_path, "--fast_seconds", "0.1", "0.2", "0.4"))
    assert parts_run == ["run"]
    assert "T 2, seed 0, fast 0.2 s" in json.loads((tmp_path / "bench.json").read_text())["runs"]


def test_one_of_other_settings_is_not_gone_on_with(state, arguments, tmp_path):
    (tmp_path / "bench.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="other settings .turns: 1 -> 2.: name another --output_dir"):
        script.main(arguments(tmp_path, "--turns=2"))


def test_one_of_another_preset_is_not_gone_on_with(state, arguments, tmp_path):
    before = {**state, "settings": {**state["settings"], "fast: scoring": "random"}}
    (tmp_path / "bench.json").write_text(json.dumps(before))
    with pytest.raises(ValueError, match="other settings .fast: scoring: random -> between.: name another"):
        script.main(arguments(tmp_path))


@pytest.mark.parametrize(("name", "content"), [("pipeline.txt", "x"), ("bench.md", "{}")])
def test_a_folder_of_something_else_is_refused(arguments, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="is not empty"):
        script.main(arguments(tmp_path))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--paper_seconds=0", "--paper_seconds .0.0.: give at least one number, above 0"),
        ("--turns=0", "--turns 0, --num_samples 16: give at least 1 and 2"),
    ],
)
def test_bad_numbers_are_refused(arguments, tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        script.main(arguments(tmp_path / "new", option))
    assert not (tmp_path / "new").exists()


def test_the_clock_runs_inside_its_blocks_only():
    watch = script.Stopwatch()
    for _ in range(2):
        with watch:
            time.sleep(0.02)
        begin = time.process_time()
        while time.process_time() < begin + 0.1:
            time.sleep(0)
    assert watch.seconds >= 0.04
    assert watch.cpu_seconds < 0.1


def test_measuring_does_not_count_as_training(teacher, monkeypatch):
    def measure(*_):
        begin = time.process_time()
        while time.process_time() < begin + 0.5:
            pass
        return 1.0

    monkeypatch.setattr(script, "measure", measure)
    bench = script.Benchmark(pretrained_teacher_model=str(teacher), train_batch_size=4)
    points = script.run("fast", 10**6, [0.1, 0.2, 0.3], 2, 0, None, bench)["points"]
    assert len(points) == 3
    assert 0.3 <= points[-1]["cpu_seconds"] < 0.8


def test_a_run_without_marks_ends_with_its_learning_rate_at_zero(teacher, monkeypatch):
    rates = []
    monkeypatch.setattr(script, "measure", lambda players, *_: rates.append(players.layer_optimizer) or 1.0)
    bench = script.Benchmark(pretrained_teacher_model=str(teacher), train_batch_size=4)
    (point,) = script.run("fast", 60, [], 2, 0, None, bench)["points"]
    assert point["updates"] == 60
    assert rates[0].param_groups[0]["lr"] == 0


def test_network_calls_are_counted_exactly(teacher, monkeypatch):
    monkeypatch.setattr(script, "measure", lambda *_: 1.0)
    bench = script.Benchmark(pretrained_teacher_model=str(teacher), train_batch_size=64, turns=2)
    costs = script.compare_costs(2, 0, None, bench)
    assert costs["fast"]["calls"] == {"student": 1, "critic": 1, "teacher": 1, "simulated": 0}
    paper = costs["paper"]["calls"]
    # 20 batches, of which half the rows were first simulated through one layer: a share of 0.5 +- 0.01 each.
    assert 20 * 0.45 < paper["simulated"] < 20 * 0.55
    assert paper["student"] == 20 + paper["simulated"]
    assert (paper["critic"], paper["teacher"]) == (21, 1)
    assert all(len(costs[preset]["seconds"]) == 2 for preset in costs)


def test_the_students_calls_are_those_of_the_chains_and_of_the_batches(teacher, monkeypatch):
    """The rows said to be simulated are those that the chains asked for."""
    monkeypatch.setattr(script, "measure", lambda *_: 1.0)
    bench = script.Benchmark(pretrained_teacher_model=str(teacher), train_batch_size=8)
    players = script.make_players("paper", 3, 0, 10, bench)
    (chain,) = players.chains
    drawn, draw = [], chain.draw

    def watched(*args):
        batch = draw(*args)
        drawn.append(int((2 - batch.t).sum()))
        return batch

    chain.draw = watched
    with players.counting_rows() as rows:
        script.take(players.updates(0), 2)
    assert len(drawn) == 2 * 20
    assert rows["student"] == sum(drawn) + 8 * 2 * 20


def point(seconds, fd):
    return {"updates": int(10 * seconds), "seconds": 2 * seconds, "cpu_seconds": seconds, "fd": fd}


def decide(paper, fast):
    """Of times and FDs of both."""
    costs = {preset: {"untrained_fd": 9.0} for preset in ("paper", "fast")}
    runs = {"T 5, seed 1, costs": costs, "T 5, seed 1, paper": {"points": [point(*each) for each in paper]}}
    runs.update({f"T 5, seed 1, fast {each[0]} s": {"points": [point(*each)]} for each in fast})
    return script.decide(runs, 5, 1)


def test_the_targets_are_the_best_of_paper_and_its_end_and_the_shortest_run_as_good_counts():
    found = decide([(50, 4.0), (100, 3.0), (120, 3.5)], [(24, 2.0), (2, 8.0), (6, 3.4), (10, 3.0)])
    assert found["best"]["target"]["cpu_seconds"] == 100
    assert found["best"]["reached"]["cpu_seconds"] == 10
    assert found["best"]["speed_up"] == found["best"]["wall_speed_up"] == 10
    assert found["end"]["target"]["cpu_seconds"] == 120
    assert found["end"]["speed_up"] == 20
    assert script.race_row(5, "1", [found]) == (
        "| 5 | 1 | 9.00 | 9.00 | 3.00: 100.0 s, 1000 | 3.00: 10.0 s, 100 | **10.0** (10.0) "
        "| 3.50: 120.0 s, 1200 | 3.40: 6.0 s, 60 | **20.0** (20.0) | 2.00: 24.0 s, 240 |"
    )


def test_a_run_does_not_count_if_a_longer_one_was_worse_than_the_target():
    found = decide([(100, 3.0)], [(2, 2.0), (10, 5.0), (20, 2.9), (40, 1.0)])["best"]
    assert found["reached"]["cpu_seconds"] == 20
    assert not found["bound"]


def test_where_the_shortest_run_is_good_enough_the_speed_up_is_a_bound():
    found = decide([(100, 3.0)], [(2, 1.0), (10, 0.9)])
    assert "| **>= 50.0** (50.0) |" in script.race_row(5, "1", [found])


def test_where_no_run_is_good_enough_the_table_says_so():
    missed = decide([(100, 0.5)], [(2, 1.0), (100, 0.9)])
    hit = decide([(100, 2.0)], [(1, 3.0), (2, 1.0), (100, 0.9)])
    assert missed["best"]["speed_up"] is None
    assert "not reached" in script.race_row(5, "1", [missed])
    assert "| **50.0** (50.0), 1 of 2 seeds |" in script.race_row(5, "mean", [missed, hit])


def test_the_mean_tells_the_least_speed_up_too():
    found = [decide([(100, 2.0)], [(1, 3.0), (seconds, 1.0)]) for seconds in (2, 10)]
    assert "| **30.0** (30.0), least 10.0 |" in script.race_row(5, "mean", found)


def test_the_contenders_take_turns_in_being_first():
    bench = script.Benchmark(num_layers=[5], seeds=[0, 1], fast_seconds=[2.0])
    runs = {f"T 5, seed {seed}, costs": {"fast": {"cpu_seconds": [0.1]}} for seed in (0, 1)}
    names = [name.split(", ")[2] for name, _ in script.jobs(bench, None, runs)]
    assert names == ["costs", "paper", "fast 2 s", "costs", "fast 2 s", "paper"]


def test_help_names_its_group(check_help):
    check_help(script.main, "benchmark")

import re

from training.benchmarks.images import bench_sampling as script


def test_it_prints_a_ratio_to_the_bare_calls_for_each_contender(fast_run, capsys):
    script.main([f"--pipeline={fast_run / 'pipeline'}", "--repetitions=2", "--batch_size=2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("batch 2, 2 turns, ")
    assert re.fullmatch(r"2 bare calls of the UNet +\d+\.\d\d ms +1\.000", lines[1])
    assert len(lines) == 5
    for line in lines[1:]:
        assert re.search(r" ms +\d+\.\d{3}$", line)


def test_all_contenders_call_the_network_equally_often(fast_run):
    pipeline = script.load_pipeline(str(fast_run / "pipeline"))
    calls = []
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    for run in script.make_contenders(pipeline, batch_size=2).values():
        calls.clear()
        run()
        assert len(calls) == 2

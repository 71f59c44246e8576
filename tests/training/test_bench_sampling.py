import re

from training.benchmarks.images import bench_sampling as script


def test_it_prints_a_ratio_to_the_bare_calls_for_each_contender_which_calls_the_network_as_often(fast_run, capsys):
    script.main([f"--pipeline={fast_run / 'pipeline'}", "--repetitions=2", "--batch_size=2"])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("batch 2, 2 turns, ")
    assert re.fullmatch(r"2 bare calls of the UNet +\d+\.\d\d ms +1\.000", lines[0])
    assert [bool(re.search(r" ms +\d+\.\d{3}$", line)) for line in lines] == [True] * 4
    pipeline, calls = script.load_pipeline(str(fast_run / "pipeline")), []
    pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    for run in script.make_contenders(pipeline, batch_size=2).values():
        calls.clear()
        run()
        assert len(calls) == 2

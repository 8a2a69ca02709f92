"""A run is paid for once: training survives what comes after it, and slow data is counted."""

from __future__ import annotations

import json
import re
import time
from types import SimpleNamespace

import helpers
from helpers import ROOT, train_gpt

# Runs the script in a process in which one function ends the process without any clean-up.
DIE_IN = """
import os, sys
sys.path.insert(0, {root!r})
import train_gpt
{owner}.{name} = lambda *_, **__: os._exit(9)
train_gpt.main()
"""


def die_in(owner: str, name: str, settings: dict) -> None:
    """Run with a function that kills its process."""
    driver = settings["OUTPUT_DIR"] / "driver.py"
    driver.write_text(DIE_IN.format(root=str(ROOT), owner=owner, name=name))
    result = helpers.run(settings, script=driver)
    assert result.returncode == 9, result.stderr


def run_settings(corpus, folder, run_id: str, **changes) -> dict:
    more = {"OUTPUT_DIR": folder, "RUN_ID": run_id, "CHECKPOINT_SECONDS": 0, **changes}
    return helpers.TINY | corpus.settings | more


def test_a_kill_during_the_choice_of_the_candidate_costs_no_training(corpus, tmp_path):
    whole = run_settings(corpus, tmp_path, "whole")
    killed = run_settings(corpus, tmp_path, "killed")
    helpers.run_well(whole)
    die_in("train_gpt.Trainer", "rank_candidates", killed)
    helpers.run_well(killed)
    log = (tmp_path / "killed" / "train.log").read_text()
    assert "continued after step 20" in log
    assert len(re.findall(r"^step:\d+/20 train_loss:", log, re.MULTILINE)) == 20  # none again
    artifacts = [tmp_path / run_id / "model.int6.ptz" for run_id in ("whole", "killed")]
    assert artifacts[0].read_bytes() == artifacts[1].read_bytes()


def test_a_kill_during_the_export_costs_no_choice(corpus, tmp_path):
    killed = run_settings(corpus, tmp_path, "export")
    die_in("train_gpt.Trainer", "validate", killed)
    helpers.run_well(killed)
    assert (tmp_path / "export" / "results.json").exists()


class SlowDisk:
    """Stands for the thread that reads: each answer comes a quarter of a second late."""

    def __init__(self, seconds: helpers.Seconds) -> None:
        self.seconds = seconds

    def submit(self, read, *given):
        def result():
            self.seconds.now += 0.25
            return read(*given)

        return SimpleNamespace(result=result)

    def shutdown(self, cancel_futures: bool) -> None:
        pass


def test_slow_data_is_counted_and_changes_nothing(corpus, settings, processes, monkeypatch):
    h = settings(**{name.lower(): value for name, value in corpus.settings.items()})
    data = train_gpt.TrainingData(h)
    expected = [data.micro_batches(step, processes) for step in range(3)]
    seconds = helpers.Seconds()
    monkeypatch.setattr(time, "perf_counter", seconds)
    loader = train_gpt.BatchLoader(data, processes)
    loader.close()
    loader.pool = SlowDisk(seconds)
    for step in range(3):
        for (ids, targets), (wanted_ids, wanted_targets) in zip(
            loader.micro_batches(step), expected[step], strict=True
        ):
            assert ids.equal(wanted_ids)
            assert targets.equal(wanted_targets)
    assert loader.stalls == 2  # the first step has nothing to be read ahead of
    assert loader.stall_seconds == 0.5


def test_the_log_names_the_stalls_and_metrics_has_every_logged_step(corpus, tmp_path):
    helpers.run_well(run_settings(corpus, tmp_path, "plain"))
    folder = tmp_path / "plain"
    assert "data_stalls:" in (folder / "train.log").read_text()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "train_loss" in line]
    assert steps == list(range(1, 21))
    assert lines[-1]["val_bpb"] > 0
    table = train_gpt.build_map_table(helpers.tiny_settings()).values()
    assert set(lines[-1]["adapter_ratios"]) == {spec.name for spec in table if spec.is_random}


def test_a_run_that_takes_too_long_says_so(corpus, tmp_path):
    """The export of even the smallest model takes longer than what is left after training."""
    changes = {"MAX_WALLCLOCK_SECONDS": 0.01, "GPTQ_RESERVE_SECONDS": 0, "ITERATIONS": 1}
    output = helpers.run_well(run_settings(corpus, tmp_path, "late", **changes))
    results = json.loads((tmp_path / "late" / "results.json").read_text())
    assert results["train_seconds"] + results["export_seconds"] > 0.01
    assert results["over_time_limit"]
    assert "over MAX_WALLCLOCK_SECONDS=0.01" in output


def test_the_reserve_grows_with_what_the_export_takes(settings, processes, capsys):
    h = settings(max_wallclock_seconds=100, gptq_reserve_seconds=10)
    run = train_gpt.Run(h, processes, train_gpt.RunLog(0), train_gpt.StopSignal(), None, None)
    assert train_gpt.reserve_for_export(run, 1.0) == 10
    assert train_gpt.reserve_for_export(run, 40.0) == 50
    assert "50.0 s are kept for it" in capsys.readouterr().out

"""tools/check.py passes an honest run; falsified copies fail where they lie and nowhere else."""

from __future__ import annotations

import fcntl
import functools
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers import (
    ROOT,
    SCRIPT,
    TINY,
    claim,
    log_of,
    replace,
    results_of,
    run,
    run_well,
    tool_refusal,
    train_gpt,
)

sys.path.insert(0, str(ROOT / "tools"))

import check

ALL = list(check.CHECKS)


@pytest.fixture(scope="module")
def honest(corpus, tmp_path_factory) -> Path:
    """Return the folder of a run, made once."""
    place = {"OUTPUT_DIR": tmp_path_factory.mktemp("runs"), "RUN_ID": "honest"}
    run_well({**TINY, **corpus.settings, "ITERATIONS": 6, "SEED": 42, **place})
    return place["OUTPUT_DIR"] / "honest"


@pytest.fixture(scope="module", autouse=True)
def remembered():
    """Run a child once for the same files and settings: each takes seconds."""
    run_child, known = check.run_child, {}

    def remember(task: str, s: check.Submission, *given: dict) -> dict:
        key = repr((task, s.script, s.tokenizer.read_bytes(), s.settings, given, check.namespace()))
        if key not in known:
            known[key] = run_child(task, s, *given)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "run_child", remember)
        patch.setattr(check, "count_code", functools.cache(check.count_code))
        yield


@pytest.fixture
def copied(honest, tmp_path) -> Path:
    """Return a copy to falsify."""
    return Path(shutil.copytree(honest, tmp_path / "copy"))


def submission(folder: Path, *arguments: object) -> check.Submission:
    return check.Submission(folder, check.parse([str(each) for each in (folder, *arguments)]))


def failures(folder: Path, *arguments: object) -> dict[str, str]:
    """Return the verdict and the evidence of each check that does not pass."""
    s = submission(folder, *arguments)
    results = {name: check.perform(name, s) for name in ALL}
    return {name: ": ".join(each) for name, each in results.items() if each.verdict != "pass"}


def rewrite(folder: Path, *changes: tuple[str, str]) -> check.Submission:
    """Change the script of a run, in its log and its bytes, too."""
    before = script = SCRIPT.read_text(encoding="utf-8")
    for old, new in changes:
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    replace(folder / "train.log", before, script)
    code, model = check.count_code(script.encode()), (folder / "model.int6.ptz").stat().st_size
    claim(folder, bytes_code=code, bytes_total=code + model)
    return submission(folder)


def test_honest_run_passes_every_check(honest, capsys):
    assert check.main([str(honest)]) == 0
    table = " ".join(capsys.readouterr().out.split())
    assert table.endswith("7 of 7 checks pass")
    (here,) = re.findall(r"val_bpb (\S+) here", table)
    # Its process has a clean environment, so that other kernels may add up float32 logits there.
    assert float(here) == pytest.approx(results_of(honest)["val_bpb"], rel=1e-5)
    assert f"= {results_of(honest)['bytes_total']:,} bytes" in table
    assert "ValidationStream.__init__ > read_shards" in table


def test_run_that_was_killed_and_continued_passes(corpus, tmp_path):
    """Steps after the checkpoint come twice in its log, and RESUME=1 is no setting of a copy."""
    place = {"OUTPUT_DIR": tmp_path, "RUN_ID": "killed"}
    settings = {**TINY, **corpus.settings, "ITERATIONS": 12, **place}
    plan_step, check_finite = train_gpt.Trainer.plan_step, train_gpt.Trainer.check_finite

    def save_early(trainer: train_gpt.Trainer) -> train_gpt.StepPlan:
        return plan_step(trainer)._replace(save=trainer.step == 6)

    def die_late(trainer: train_gpt.Trainer) -> None:
        check_finite(trainer)
        if trainer.step == 10:
            sys.exit("killed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt.Trainer, "plan_step", save_early)
        patch.setattr(train_gpt.Trainer, "check_finite", die_late)
        assert run(settings).returncode == 1
    run_well(settings | {"RESUME": 1})
    log, text = tmp_path / "killed" / "train.log", log_of(tmp_path / "killed")
    assert len(re.findall(r"^step:8/12 train_loss:", text, re.M)) == 2
    assert text.count("\nRUN_ID=killed\n") == 2 and "\nRESUME=1\n" in text
    s = submission(tmp_path / "killed")
    for name in ("size", "untouched", "claims"):
        assert check.perform(name, s).verdict == "pass", check.perform(name, s)
    first, mark, rest = text.rpartition("\nRUN_ID=")
    log.write_text(first.rstrip() + "\n# another source\n" + mark + rest, encoding="utf-8")
    result = check.perform("claims", submission(tmp_path / "killed"))
    assert result.evidence.startswith("the run was continued with another source")


class Rounding:
    """A fair model whose rounding depends on a batch's shape and on the row, as on a GPU."""

    def predict(self, ids: torch.Tensor, n: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * ids.size(0) + ids.size(1))
        noise = torch.randn(*ids.shape, 64, generator=generator)
        return (torch.nn.functional.one_hot(ids, 64) + 0.01 * noise)[:, -n:]

    def token_losses(self, ids: torch.Tensor, targets: torch.Tensor, streaming: bool):
        logits = self.predict(ids, targets.size(1))
        return -logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]


def test_rounding_that_depends_on_the_shape_is_no_failure():
    h = SimpleNamespace(vocab_size=64, eval_seq_len=32, eval_stride=8, eval_mode="exact")
    val = SimpleNamespace(tokens=torch.arange(100) % 64)
    p = check.Probed(None, h, SimpleNamespace(device="cpu"), Rounding(), val)
    assert check.distance_from_softmax(p) <= check.PROBABILITY
    assert max(check.changes_of_losses(p)) <= check.PROBABILITY


def figures(**changes):
    return lambda folder: claim(folder, **changes)


def another_score(folder: Path) -> None:
    """Claim another val_bpb, the same in the log and in results.json."""
    bpb = results_of(folder)["val_bpb"]
    replace(folder / "train.log", f"val_bpb:{bpb:.8f}", f"val_bpb:{bpb - 0.01:.8f}")
    claim(folder, val_bpb=bpb - 0.01)


def damage(folder: Path) -> None:
    blob = bytearray((folder / "model.int6.ptz").read_bytes())
    blob[len(blob) // 2] ^= 1
    (folder / "model.int6.ptz").write_bytes(blob)


@pytest.mark.parametrize(
    "falsify, failing, says",
    [
        (figures(bytes_total=100_000), "size", "bytes_total 100,000, not"),
        (figures(val_bpb=1.05), "evaluation claims", "results.json has val_bpb 1.05000000"),
        (another_score, "evaluation bytes", "train.log has val_bpb"),
        (figures(train_seconds=700), "claims", "training and export over 600 s"),
        (figures(train_seconds=0.001), "claims", "train_seconds: "),
        (figures(export_seconds=-1), "claims", "a time is negative"),
        (figures(steps=7), "claims", "steps: 6 in the log, 7 in results.json"),
        (figures(seed=1), "claims", "seed: 42 in the log, 1 in results.json"),
        (figures(hardware="8 x H100"), "claims", "hardware: "),
        (figures(eval_seconds=math.nan), "claims", "has no figure eval_seconds"),
        (damage, "evaluation probabilities scoring", "the artifact is damaged"),
    ],
)
def test_falsified_claim_fails_where_it_is_checked(copied, falsify, failing, says):
    falsify(copied)
    found = failures(copied)
    assert list(found) == failing.split() and says in " ".join(found.values()), found
    assert check.main([str(copied)]) == 1


def test_limits_are_the_users(honest):
    figures = results_of(honest)
    limit = figures["train_seconds"] + figures["export_seconds"] / 2  # the export counts, too
    for option, value, failing in [
        ("--size-limit", 50_000, "size"),
        ("--eval-limit", 0.001, "claims"),
        ("--train-limit", limit, "claims"),
    ]:
        assert list(failures(honest, option, value)) == [failing]


def test_missing_part_is_said_and_does_not_pass(copied, tmp_path):
    (copied / "model.int6.ptz").unlink()
    found = failures(copied)
    assert list(found) == ["size", "evaluation", "probabilities", "scoring"]
    assert "copy the run's model.int6.ptz to" in found["size"]
    (copied / "results.json").unlink()
    assert "copy the run's results.json to" in check.perform("claims", submission(copied)).evidence
    result = check.perform("bytes", submission(copied, "--data", tmp_path))
    assert result.verdict != "pass" and "give --data" in result.evidence


def test_what_is_no_finished_run_is_refused_in_one_line(copied, tmp_path, capsys):
    assert "has no train.log; it is not a run's folder" in tool_refusal(
        capsys, check.main, tmp_path
    )
    with (copied / "train.log").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert "the run is still going; wait" in tool_refusal(capsys, check.main, copied)
    for arguments in ([str(tmp_path / "absent")], [str(copied), "--steps", "0"]):
        with pytest.raises(SystemExit) as ended:
            check.main(arguments)
        assert ended.value.code == 2


def test_script_that_trains_on_validation_text_is_seen_and_shown(copied, tmp_path):
    """Two proofs: who opened the shards, and what the weights are. It also reads a foreign file."""
    hint = tmp_path / "hint"
    hint.write_text("what training should not know")
    peek = 'read_shards(h.data_path, "train")'
    seed = "    torch.manual_seed(h.seed)\n    if saved:"
    s = rewrite(
        copied,
        (peek, peek + ' + read_shards(h.data_path, "val")'),
        (seed, seed.replace("\n", f"\n    Path({str(hint)!r}).read_bytes()\n", 1)),
    )
    result = check.perform("untouched", s)
    assert result.verdict == "FAIL"
    assert "opened by main > run_job > train_and_export > TrainingData" in result.evidence
    for effect in ("weights", "artifact", "losses"):
        assert f"other validation text gives other {effect}" in result.evidence
    assert f"other files opened: {hint}; " in result.evidence
    for name in ("size", "bytes", "claims"):
        assert check.perform(name, s).verdict == "pass"


def test_script_whose_losses_are_no_fair_probabilities(copied):
    """It sees the next tokens and other windows, is a little too sure, counts the tail twice."""
    counts = "np.diff(starts + length, prepend=0)"
    s = rewrite(
        copied,
        ("is_causal=True", "is_causal=False"),
        (".triu(position - begin + 1)", ".triu(end)"),
        ('reduction="none").view_as', 'reduction="none").sub(1e-3).view_as'),
        ("norm(keep_last(x, keep))", "norm(keep_last(x + 0.01 * x.mean(0, keepdim=True), keep))"),
        (counts, f"np.where(np.arange(len(starts)), stride, {counts})"),
    )
    result = check.perform("probabilities", s)
    problems = ("are not those of one distribution", "future changes the past", "other windows of")
    assert result.verdict == "FAIL" and all(problem in result.evidence for problem in problems)
    result = check.perform("scoring", s)
    assert result.verdict == "FAIL" and "34 tokens: mean" in result.evidence
    assert "33 tokens: mean" not in result.evidence  # the first window alone has no tail


def test_script_that_uses_the_network_another_file_and_too_many_bytes(
    copied, tmp_path, monkeypatch
):
    """Its own figures agree, and it does not notice its attempts. Also without a namespace."""
    monkeypatch.setattr(check, "namespace", lambda: ())
    hint = tmp_path / "hint"
    hint.write_text("what the artifact has no room for")
    asks = f"""model.eval()
    import socket
    with contextlib.suppress(OSError):
        socket.create_connection(("192.0.2.1", 9), 1)
    Path({str(hint)!r}).read_bytes()
    num_targets ="""
    s = rewrite(
        copied,
        ("self.bytes = tokenizer.count_bytes(", "self.bytes = 2 * tokenizer.count_bytes("),
        ("model.eval()\n    num_targets =", asks),
    )
    bpb = results_of(copied)["val_bpb"]
    replace(copied / "train.log", f"val_bpb:{bpb:.8f}", f"val_bpb:{bpb / 2:.8f}")
    claim(copied, val_bpb=bpb / 2)
    result = check.perform("evaluation", s)
    assert result.verdict == "FAIL"
    problems, _, _ = result.evidence.partition("; val_bpb")
    assert problems.startswith("the script used the network: socket.")
    assert problems.endswith(f"; other files opened: {hint}")
    assert "sockets refused in Python" in result.evidence
    assert check.perform("bytes", s).verdict == "FAIL"


def test_child_has_a_clean_environment_and_an_end(copied, monkeypatch):
    """The user's MODEL_LIMIT_BYTES wins over that of the log."""
    monkeypatch.setenv("TOKEN_OF_THE_USER", "secret")
    monkeypatch.setenv("MODEL_LIMIT_BYTES", "123")
    script = copied / "train_gpt.py"
    script.write_text("import os\ndef main(): print(dict(os.environ))\n")
    output = check.run_child("evaluate", submission(copied), {}, {"ITERATIONS": 7})["output"]
    assert "'ITERATIONS': '7'" in output and "'PATH': " in output and "secret" not in output
    assert "'MODEL_LIMIT_BYTES': '123'" in output and "'RUN_ID'" not in output
    script.write_text("import time\ntime.sleep(100)\n")
    with pytest.raises(check.CannotCheck, match=r"takes over 0\.5 s here; give more with --time"):
        check.run_child("evaluate", submission(copied, "--timeout", 0.5), {}, {})


@pytest.mark.parametrize(
    "old, new",
    [
        ("\nEXPORT_ONLY=0\n", "\nEXPORT_ONLY=1\n"),
        ("\nversions ", "\nwarning: the script has changed since …\nversions "),
    ],
)
def test_export_of_what_another_start_trained_is_no_run_of_this_script(copied, old, new):
    replace(copied / "train.log", old, new)
    result = check.perform("claims", submission(copied))
    assert result.verdict == "FAIL"
    assert result.evidence.startswith("the weights were trained by another start; check that run")

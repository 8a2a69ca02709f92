"""tools/check.py passes an honest run; falsified copies fail where they lie and nowhere else."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT, SCRIPT, TINY, environment, fork_children, run_well, train_gpt

TOOL = ROOT / "tools" / "check.py"
spec = importlib.util.spec_from_file_location("check", TOOL)
check = sys.modules["check"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)
ALL = list(check.CHECKS)


@pytest.fixture(scope="module")
def honest(corpus, tmp_path_factory) -> Path:
    """Return the folder of a run, made once."""
    runs = tmp_path_factory.mktemp("runs")
    run_well(
        {
            **TINY,
            **corpus.settings,
            "ITERATIONS": 6,
            "SEED": 42,
            "OUTPUT_DIR": runs,
            "RUN_ID": "honest",
        }
    )
    return runs / "honest"


@pytest.fixture(scope="module", autouse=True)
def remembered(tmp_path_factory):
    """Run a child once for the same files and settings: each takes seconds."""
    known, store = {}, tmp_path_factory.mktemp("remembered")
    run_child = check.run_child

    def remember(task: str, folder: Path, settings: dict, timeout: float) -> dict:
        contents = [
            (str(path.relative_to(folder)), path.read_bytes())
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        key = hashlib.sha256(
            repr((task, contents, sorted(settings.items()), check.namespace())).encode()
        )
        kept = store / key.hexdigest()
        if kept.name not in known:
            known[kept.name] = run_child(task, folder, settings, timeout)
            (folder / "runs").mkdir(exist_ok=True)
            shutil.copytree(folder / "runs", kept)
        shutil.copytree(kept, folder / "runs", dirs_exist_ok=True)
        return known[kept.name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "run_child", remember)
        yield


@pytest.fixture
def copied(honest, tmp_path, monkeypatch) -> Path:
    """Return a copy to falsify."""
    fork_children(check, monkeypatch)
    return Path(shutil.copytree(honest, tmp_path / "copy"))


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def claim(folder: Path, **figures) -> None:
    path = folder / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | figures))


def claims(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def rewrite(folder: Path, **changes: tuple[str, str]) -> check.Submission:
    """Change the script of a submission everywhere: in the folder, the log and the sizes."""
    script = SCRIPT.read_text(encoding="utf-8")
    for old, new in changes.values():
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    log = folder / "train.log"
    replace(log, SCRIPT.read_text(encoding="utf-8"), script)
    (folder / "train_gpt.py").write_text(script, encoding="utf-8")
    code, model = check.count_code(script.encode()), (folder / "model.int6.ptz").stat().st_size
    replace(
        log,
        f"artifact code {train_gpt.code_bytes():,} + model {model:,}",
        f"artifact code {code:,} + model {model:,}",
    )
    claim(folder, bytes_code=code, bytes_total=code + model)
    return check.Submission(folder, check.Options())


def verdicts(capsys, folder: Path, *arguments: str) -> tuple[int, dict[str, str], str]:
    """Return the exit code, each check's verdict, and the table."""
    code = check.main([str(folder), *arguments])
    table = capsys.readouterr().out
    rows = [line for line in table.splitlines()[:-1] if not line.startswith(" ")]
    found = {line[:15].strip(): line[15:28].strip() for line in rows}
    assert list(found) == ALL
    return code, found, " ".join(table.split())


def others_pass(found: dict[str, str], *failing: str) -> bool:
    return all(
        verdict == ("FAIL" if name in failing else "pass") for name, verdict in found.items()
    )


# ---- The whole command ---------------------------------------------------------------------------


def test_honest_run_passes_every_check(honest, capsys, monkeypatch):
    """The training is a new interpreter's: it may import what it likes without being noticed."""
    fork_children(check, monkeypatch, fresh=["train"])
    code, found, table = verdicts(capsys, honest)
    assert code == 0 and others_pass(found), table
    assert f"{claims(honest)['val_bpb']:.8f} here" in table
    assert f"= {claims(honest)['bytes_total']:,} bytes" in table
    assert "ValidationStream.__init__ > read_shards" in table
    assert table.endswith("8 of 8 checks pass")


def test_streaming_evaluation_is_probed_as_such(honest, copied):
    """A token then sees more than its window, so its loss is another one."""
    replace(copied / "train.log", "\nEVAL_MODE=exact\n", "\nEVAL_MODE=streaming\n")
    s = check.Submission(copied, check.Options())
    results = check.check_probabilities(s), check.check_scoring(s)
    assert [result.verdict for result in results] == ["pass", "pass"], results
    exact = check.Submission(honest, check.Options()).probed()
    assert s.probed()["loop"] != exact["loop"]


def figures(**changes):
    return lambda folder: claim(folder, **changes)


def lines(old: str, new: str):
    def change(folder: Path) -> None:
        path = folder / "train.log"
        text, count = re.subn(old, new, path.read_text(encoding="utf-8"), flags=re.M)
        assert count
        path.write_text(text, encoding="utf-8")

    return change


def over_the_time(folder: Path) -> None:
    """Claim times that agree with each other and with the log, and are over the limit."""
    seconds, steps = claims(folder)["train_seconds"], claims(folder)["steps"]
    milliseconds = round(1000 * seconds)
    claim(folder, train_seconds=700.0, tokens_per_second=round(steps * 256 / 700))
    log = folder / "train.log"
    before = [
        line
        for line in log.read_text("utf-8").splitlines()
        if f"train_time:{milliseconds}ms " in line
    ]
    average = before[-1].rpartition("step_avg:")[2]
    replace(
        log,
        f"train_time:{milliseconds}ms step_avg:{average}",
        f"train_time:700000ms step_avg:{700_000 / steps:.2f}ms",
    )


def another_score(folder: Path) -> None:
    """Claim another val_bpb, the same in the log and in results.json."""
    bpb = claims(folder)["val_bpb"]
    replace(folder / "train.log", f"val_bpb:{bpb:.8f}", f"val_bpb:{bpb - 0.01:.8f}")
    claim(folder, val_bpb=bpb - 0.01, val_bpb_sliding_window=bpb - 0.01)


@pytest.mark.parametrize(
    "falsify, failing, says",
    [
        (figures(bytes_total=100_000), ["size"], "bytes_total 100,000, not"),
        (figures(bytes_code=70_000), ["size"], "bytes_code 70,000, not"),
        (
            figures(val_bpb=1.05),
            ["evaluation", "agreement"],
            "results.json has val_bpb 1.05000000",
        ),
        (figures(val_bpb_roundtrip=1.05), ["agreement"], "val_bpb_roundtrip"),
        (figures(dataset="fineweb"), ["agreement"], "dataset: fineweb and"),
        (another_score, ["evaluation", "bytes"], "train.log has val_bpb"),
        (over_the_time, ["seconds"], "FAIL training and export over 600 s; training 700"),
        (figures(train_seconds=0.001), ["seconds"], "the log's clock ends at"),
        (figures(export_seconds=601), ["seconds"], "training and export over 600 s"),
        (figures(eval_seconds=601), ["seconds"], "FAIL evaluation over 600 s"),
        (figures(eval_seconds=0.001), ["seconds"], "the log's evaluations took"),
        (figures(steps=7), ["seconds"], "the log ends at step 6, results.json at 7"),
        (figures(tokens_per_second=10**9), ["seconds"], "1,000,000,000 a second"),
        (figures(export_seconds=-1), ["seconds"], "a time is negative"),
        (
            lines(r"^(step:3/.*step_avg:)", r"\g<1>9"),
            ["seconds"],
            "step_avg × steps is not train_time",
        ),
        (
            lines(r"^(step:3/.*train_time:)\S+ step_avg:.*", r"\g<1>0ms step_avg:0.00ms"),
            ["seconds"],
            "FAIL train_time runs backwards; training",
        ),
        (figures(seed=1), ["agreement"], "seed: 1 and 42"),
        (lines(r"^artifact code \d", "artifact code 9"), ["agreement"], "bytes in the log"),
        (
            figures(val_loss="unknown"),
            [],
            "agreement not checked results.json has no figure val_loss",
        ),
        (
            figures(eval_seconds=math.nan),
            [],
            "seconds not checked results.json has no figure eval_seconds",
        ),
    ],
)
def test_falsified_claim_fails_where_it_is_checked(copied, capsys, falsify, failing, says):
    falsify(copied)
    code, found, table = verdicts(capsys, copied)
    assert says in table
    if not failing:  # the one that could not be made
        failing = [says.split()[0]]
        assert found[failing[0]] == "not checked"
        found[failing[0]] = "FAIL"
    assert code == 1 and others_pass(found, *failing), table


@pytest.mark.parametrize(
    "option, failing", [(["--size-limit", "50000"], "size"), (["--eval-limit", "0.01"], "seconds")]
)
def test_limits_are_the_users(honest, capsys, option, failing):
    code, found, table = verdicts(capsys, honest, *option)
    assert code == 1 and others_pass(found, failing), table


def test_export_counts_as_training(honest):
    figures = claims(honest)
    limit = figures["train_seconds"] + figures["export_seconds"] / 2
    result = check.check_seconds(check.Submission(honest, check.Options(train_limit=limit)))
    assert result.verdict == "FAIL" and result.evidence.startswith("training and export over")


def test_damaged_artifact_fails_the_evaluation_and_passes_nothing_that_reads_it(copied, capsys):
    blob = bytearray((copied / "model.int6.ptz").read_bytes())
    blob[len(blob) // 2] ^= 1
    (copied / "model.int6.ptz").write_bytes(blob)
    code, found, table = verdicts(capsys, copied)
    unread = dict.fromkeys(("probabilities", "scoring", "agreement"), "not checked")
    assert code == 1 and found == dict.fromkeys(ALL, "pass") | {"evaluation": "FAIL"} | unread, (
        table
    )
    assert "the artifact is damaged" in table


@pytest.mark.parametrize(
    "missing, still",
    [
        ("results.json", {"untouched", "probabilities", "scoring", "bytes"}),
        ("model.int6.ptz", {"seconds", "untouched", "bytes"}),
    ],
)
def test_missing_part_is_said_and_does_not_pass(copied, capsys, missing, still):
    (copied / missing).unlink()
    code, found, table = verdicts(capsys, copied)
    assert code == 1 and found == {
        name: "pass" if name in still else "not checked" for name in ALL
    }, table
    assert f"copy the run's {missing} to" in table


def test_missing_data_are_said_and_nothing_that_needs_them_passes(honest, tmp_path, capsys):
    code, found, table = verdicts(capsys, honest, "--data", str(tmp_path))
    assert code == 1 and {name for name in ALL if found[name] == "pass"} == {"size", "seconds"}, (
        table
    )
    assert "name their folder with --data" in table


def test_exit_codes_of_the_command(tmp_path):
    def command(folder: Path) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, TOOL, folder],
            env=environment({}),
            capture_output=True,
            text=True,
            timeout=60,
        )

    empty, absent = command(tmp_path), command(tmp_path / "absent")
    assert (empty.returncode, absent.returncode) == (1, 2), empty.stderr + absent.stderr
    assert empty.stderr == f"error: {tmp_path} has no train.log; it is not a run's folder\n"
    assert "Traceback" not in absent.stderr


def test_run_that_is_still_going_is_refused_in_one_line(copied, capsys):
    with (copied / "train.log").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert check.main([str(copied)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == f"error: {copied}: the run is still going; wait until it ends\n"


# ---- Falsified scripts ---------------------------------------------------------------------------


def test_script_that_trains_on_validation_text_is_seen_and_shown(copied, tmp_path):
    """Two proofs: who opened the shards, and what the weights are. It also reads a foreign file."""
    hint = tmp_path / "hint"
    hint.write_text("what training should not know")
    s = rewrite(
        copied,
        peek=(
            'read_shards(h.data_path, "train")',
            'read_shards(h.data_path, "train") + read_shards(h.data_path, "val")',
        ),
        hint=(
            "    torch.manual_seed(h.seed)\n    if saved:",
            f"    torch.manual_seed(h.seed)\n    Path({str(hint)!r}).read_bytes()\n    if saved:",
        ),
    )
    result = check.check_untouched(s)
    assert result.verdict == "FAIL"
    assert (
        "validation shards opened by main > run_job > train_and_export > TrainingData"
        in result.evidence
    )
    for effect in ("other weights", "another artifact", "other training losses"):
        assert f"other validation text gives {effect}" in result.evidence
    assert f"other files opened: {hint}; " in result.evidence
    assert {check.CHECKS[name](s).verdict for name in ("size", "seconds", "bytes")} == {"pass"}


def test_script_that_looks_ahead_and_scores_the_tail_twice(copied):
    s = rewrite(
        copied,
        ahead=("is_causal=True", "is_causal=False"),
        too=(".triu(position - begin + 1)", ".triu(end)"),
        tail=(
            "np.diff(starts + length, prepend=0)",
            "np.where(np.arange(len(starts)), stride, np.diff(starts + length, prepend=0))",
        ),
    )
    result = check.check_probabilities(s)
    assert result.verdict == "FAIL" and result.evidence.startswith(
        "the future changes the past; over"
    )
    result = check.check_scoring(s)
    assert result.verdict == "FAIL" and "34 tokens: mean" in result.evidence
    assert "33 tokens: mean" not in result.evidence  # the first window alone has no tail
    assert check.check_agreement(s).verdict == "pass"


@pytest.mark.parametrize(("few", "verdict"), [(0, "pass"), (99, "FAIL")])
def test_script_that_looks_ahead_where_few_positions_are_scored(copied, few, verdict):
    s = rewrite(
        copied,
        few=("8 * logits_to_keep <=", "logits_to_keep <="),  # 8 of 32 are not few enough
        ahead=("position - begin + 1", f"position - begin + 1 + {few} * (q.size(2) < k.size(1))"),
    )
    result = check.check_probabilities(s)
    assert result.verdict == verdict
    assert result.evidence.startswith("the future changes the past") == (verdict == "FAIL")


def test_script_whose_probabilities_are_none(copied):
    """Losses a little too small, and windows that see the windows beside them."""
    s = rewrite(
        copied,
        small=('reduction="none").view_as', 'reduction="none").sub(1e-3).view_as'),
        beside=(
            "norm(keep_last(x, logits_to_keep))",
            "norm(keep_last(x + 0.01 * x.mean(0, keepdim=True), logits_to_keep))",
        ),
    )
    result = check.check_probabilities(s)
    assert result.verdict == "FAIL"
    for problem in ("do not sum to one", "predict and losses disagree", "other windows of a batch"):
        assert problem in result.evidence


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
        count=("self.bytes = tokenizer.count_bytes(", "self.bytes = 2 * tokenizer.count_bytes("),
        asks=("model.eval()\n    num_targets =", asks),
    )
    for kind in ("roundtrip", "sliding_window"):
        bpb = claims(copied)[f"val_bpb_{kind}"]
        replace(copied / "train.log", f"val_bpb:{bpb:.8f}", f"val_bpb:{bpb / 2:.8f}")
        claim(copied, **{f"val_bpb_{kind}": bpb / 2, "val_bpb": bpb / 2})
    result = check.check_evaluation(s)
    assert result.verdict == "FAIL"
    problems, _, _ = result.evidence.partition("; val_bpb")
    assert problems.startswith("the script used the network: socket.")
    assert problems.endswith(f"; other files opened: {hint}")
    assert "sockets refused in Python" in result.evidence
    assert check.check_bytes(s).verdict == "FAIL"
    assert {check.CHECKS[name](s).verdict for name in ("size", "seconds")} == {"pass"}


def test_each_figure_of_the_probe_counts(honest):
    """Change each alone, also those that a falsified script moves together; NaN is no pass."""
    s = check.Submission(honest, check.Options())
    figures = s.probing["figures"]
    numbers = [
        ("probabilities", name) for name in ("least", "most", "predicted", "future", "others")
    ]
    numbers += [("once", "mean"), ("once", "total"), ("loop", 0), ("loop", 1)]
    falsified = [(*number, value) for number in numbers for value in (0.9, math.nan)]
    for part, name, value in [*falsified, ("once", "aligned", False)]:
        changed = json.loads(json.dumps(figures))
        (changed[part][-1] if part == "once" else changed[part])[name] = value
        s.__dict__["probing"] = {"error": "", "figures": changed}
        results = check.check_probabilities(s), check.check_scoring(s)
        assert results[part != "probabilities"].verdict == "FAIL", (name, value)
        assert results[part == "probabilities"].verdict == "pass", (name, value)


def test_answers_that_prove_nothing_fail(honest, monkeypatch):
    """Validation text without effect on the scores, shards nobody opened, a working network."""
    remembered = check.run_child

    def blind(task: str, folder: Path, *more) -> dict:
        answer = remembered(task, folder, *more)
        if task == "train":
            shutil.copytree(folder / "runs" / "val", folder / "runs" / "other", dirs_exist_ok=True)
        return answer | {
            "opened": {"train": [], "val": []},
            "network": {"kernel": "", "python": ""},
        }

    monkeypatch.setattr(check, "run_child", blind)
    s = check.Submission(honest, check.Options())
    assert check.check_untouched(s).evidence.startswith(
        "no validation shard was seen being opened; the two texts score alike"
    )
    assert check.check_evaluation(s).evidence.startswith("the network could be reached; val_bpb")


def test_child_has_a_clean_environment_and_an_end(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN_OF_THE_USER", "secret")
    (tmp_path / "train_gpt.py").write_text("import os\nprint(*os.environ)\n")
    names = check.run_child("evaluate", tmp_path, {"SEED": "1"}, 60)["output"].split()
    assert "SEED" in names and "PATH" in names and "TOKEN_OF_THE_USER" not in names
    (tmp_path / "train_gpt.py").write_text("import time\ntime.sleep(100)\n")
    with pytest.raises(
        check.CannotCheck, match=r"evaluate takes over 0\.5 s here; give more with --time"
    ):
        check.run_child("evaluate", tmp_path, {}, 0.5)


def test_agreement_of_code_settings_and_tokenizer(copied, honest, corpus, tmp_path):
    """Falsify the other facts that a submission's parts share."""
    probing = check.Submission(honest, check.Options()).probing

    def result(**options) -> check.Result:
        s = check.Submission(copied, check.Options(**options))
        s.__dict__["probing"] = probing
        return check.check_agreement(s)

    assert result().verdict == "pass"
    other = tmp_path / "other.model"
    other.write_bytes(corpus.tokenizer.read_bytes() + b"\n")
    assert "the artifact's tokenizer: " in result(tokenizer=str(other)).evidence
    (copied / "train_gpt.py").write_bytes(SCRIPT.read_bytes().replace(b"maps", b"Maps"))
    assert "SHA-256 of the code and the log's: " in result().evidence
    (copied / "train_gpt.py").unlink()
    replace(copied / "train.log", "\nLOGIT_SOFTCAP=30.0\n", "\nLOGIT_SOFTCAP=31.0\n")
    assert result() == check.Result("FAIL", result().evidence)
    assert result().evidence.startswith("LOGIT_SOFTCAP: 30.0 and 31.0; ")

"""Every example runs, small, as a user would run it: its figures, its controls, its C++ app."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from example_runs import ROOT, assert_files, run_example
from torch import nn

MEMORY_MIX = ROOT / "examples" / "06_memory_mix"
# Outside of the temporary folder, so that a second run of the tests has nothing to compile.
APP_BUILD = ROOT / "build" / "examples" / f"memory_mix_app-{torch.__version__.split('+')[0]}"


@pytest.fixture(scope="module")
def memory_mix(tmp_path_factory) -> tuple[Path, str, dict]:
    out = tmp_path_factory.mktemp("memory_mix")
    return out, *run_example(MEMORY_MIX, "--out", out, "--app-build", APP_BUILD)


def ask(*arguments: object, lines: str = "") -> subprocess.CompletedProcess:
    command = [str(word) for word in (APP_BUILD / "memory_mix", *arguments)]
    return subprocess.run(command, capture_output=True, text=True, input=lines, timeout=60)


class TestMemoryMix:
    def test_figures(self, memory_mix):
        figures = memory_mix[2]
        assert set(figures) == {
            "fact_accuracy", "gate_zero_facts", "empty_memory_facts",
            "local_accuracy", "gate_one_local", "gate_auc", "swap_follows_new_memory",
            "new_entry_found", "conflict_token_gate", "conflict_scalar_gate", "gate_moved",
            "cpp_max_error",
        }  # fmt: skip
        # A few seconds of training: the full figures are those of the default run. Seen here: 0.97,
        # 0.96, 0.98 and 0.995.
        assert figures["fact_accuracy"] >= 0.85
        assert figures["swap_follows_new_memory"] >= 0.85
        assert figures["new_entry_found"] >= 0.75
        assert figures["local_accuracy"] >= 0.95
        assert figures["gate_auc"] >= 0.99
        assert figures["gate_moved"] >= 0.9
        assert figures["conflict_token_gate"] >= 0.9
        assert figures["cpp_max_error"] <= 1e-5

    def test_controls_fail(self, memory_mix):
        figures = memory_mix[2]
        # Chance is 1 in 104 names; some abbreviations are like the name they stand for, and 0.03 of
        # 100 questions was seen.
        assert figures["gate_zero_facts"] <= 0.15
        assert figures["empty_memory_facts"] <= 0.15
        assert figures["gate_one_local"] <= 0.05
        assert figures["conflict_scalar_gate"] <= 0.6

    def test_files(self, memory_mix):
        assert_files(memory_mix[0], "gates.png", "reads.png", "memory_mix.pt")

    def test_says_what_to_do_next(self, memory_mix):
        out, printed, _ = memory_mix
        assert f"{APP_BUILD / 'memory_mix'} {out / 'memory_mix.pt'}" in printed
        assert "--add" in printed

    def test_app_answers_arguments_and_lines_alike(self, memory_mix):
        model = memory_mix[0] / "memory_mix.pt"
        entry = ("Zq. Rep.", "Reports of the Court of Zq")
        by_arguments = ask(model, "7 Zq. Rep. 8", "--add", *entry, "7 Zq. Rep. 8")
        lines = f"7 Zq. Rep. 8\n\nadd {entry[0]} = {entry[1]}\n7 Zq. Rep. 8\n"
        by_lines = ask(model, lines=lines)
        assert by_arguments.returncode == by_lines.returncode == 0
        assert by_arguments.stdout == by_lines.stdout
        before, after = by_lines.stdout.split("added")
        assert entry[1] not in before
        assert entry[1] in after.split("7 Zq. Rep. 8")[1]

    @pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty", "missing"])
    def test_app_refuses_a_corrupt_model(self, memory_mix, tmp_path, damage):
        whole = (memory_mix[0] / "memory_mix.pt").read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 0xFF
        content = {
            "cut": whole[: len(whole) // 2], "flipped": bytes(flipped), "text": b"not a model",
            "empty": b"",
        }  # fmt: skip
        path = tmp_path / "model.pt"
        if damage in content:
            path.write_bytes(content[damage])
        assert_one_line(ask(path, "410 U.S. 113"), str(path))

    def test_app_refuses_a_foreign_model(self, memory_mix, tmp_path):
        scripted, state_dict = tmp_path / "scripted.pt", tmp_path / "state_dict.pt"
        torch.jit.script(nn.Linear(2, 2)).save(scripted)
        torch.save(nn.Linear(2, 2).state_dict(), state_dict)
        assert_one_line(ask(scripted, "410 U.S. 113"), "not of this example")
        assert_one_line(ask(state_dict, "410 U.S. 113"), "not a TorchScript model")

    @pytest.mark.parametrize(
        "arguments", [[], ["--add"], ["MODEL", "--add", "A."], ["MODEL", "--what"]]
    )
    def test_app_explains_its_usage(self, memory_mix, arguments):
        result = ask(*arguments)
        assert result.returncode == 2
        assert result.stdout == ""
        assert result.stderr.startswith("usage: memory_mix MODEL.pt")

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["--add", "", "Name"], "1 to 32 characters, got 0"),
            (["--add", "A." * 20, "Name"], "1 to 32 characters, got 40"),
            (["--add", "A.", "N" * 65], "1 to 64 characters, got 65"),
            (["  "], "must not be empty"),
        ],
    )
    def test_app_refuses_bad_entries(self, memory_mix, arguments, complaint):
        assert_one_line(ask(memory_mix[0] / "memory_mix.pt", *arguments), complaint)

    def test_interrupt_leaves_no_file(self, tmp_path):
        command = [sys.executable, MEMORY_MIX / "run.py", "--out", tmp_path / "out"]
        # A runner in the background ignores SIGINT, and so would the example it starts.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(
            [str(word) for word in command], stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        signal.signal(signal.SIGINT, before)
        try:
            shown = ""
            deadline = time.monotonic() + 120
            while "train:" not in shown and time.monotonic() < deadline:
                shown += process.stderr.read(1)
            process.send_signal(signal.SIGINT)
            _, rest = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 130
        assert "Traceback" not in rest
        assert rest.splitlines()[-1] == "Interrupted: no file was left half-written."
        assert list(tmp_path.rglob("*.*")) == []


def assert_one_line(result: subprocess.CompletedProcess, expected: str) -> None:
    assert result.returncode == 2
    assert result.stdout == ""
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1


def test_atomic_file_is_whole_or_absent(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    from shared.example import atomic

    path = tmp_path / "folder" / "file"
    with contextlib.suppress(KeyboardInterrupt), atomic(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert list(path.parent.iterdir()) == []
    with atomic(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert [entry.read_text() for entry in path.parent.iterdir()] == ["whole"]

"""Checkpoints between Python and C++: both sides read what the other wrote.

`python tests/python/test_checkpoint.py tests/data` renews the files kept there for the C++ tests.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import mixhead
import pytest
import torch


def layer():
    torch.manual_seed(0)
    attention = mixhead.MixedMultiheadAttention(
        8, 2, batch_first=True, gate="token", memory_projection="own"
    )
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention.eval()


def kernel_layer():
    torch.manual_seed(0)
    attention = mixhead.KernelMultiheadAttention(
        8, 2, batch_first=True, kernel=["gaussian", "laplacian"], bandwidth=torch.ones(2, 4)
    )
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention.eval()


def write_files(folder):
    write_mixed_layer(folder)
    attention, tokens = kernel_layer(), torch.randn(2, 3, 8)
    with torch.no_grad():
        output, weights = attention(tokens, tokens, tokens)
    torch.save(dict(attention.state_dict()), folder / "kernel_layer_state.pt")
    example = {"tokens": tokens, "output": output, "weights": weights}
    torch.save(example, folder / "kernel_layer_example.pt")


def write_mixed_layer(folder):
    attention = layer()
    tokens, memory = torch.randn(2, 3, 8), torch.randn(4, 8)
    with torch.no_grad():
        output, weights = attention(tokens, tokens, tokens, memory=memory)
    torch.save(dict(attention.state_dict()), folder / "attention_state.pt")
    torch.save(
        {"tokens": tokens, "memory": memory, "output": output, "weights": weights},
        folder / "attention_example.pt",
    )
    scripted = folder / "attention_scripted.pt"
    torch.jit.script(attention).save(scripted)
    drop_debug_records(scripted)


def drop_debug_records(path):
    """Leaves out the debug records of a scripted file: they name folders of this machine."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, record in records.items():
            if not name.endswith(".debug_pkl"):
                archive.writestr(name, record)


def cpp_tests():
    """The GoogleTest program of the build folder of this torch, which `make test` builds first."""
    release = torch.__version__.split("+")[0]
    build = Path(__file__).parents[2] / "build" / f"torch-{release}"
    return Path(os.environ.get("MIXHEAD_CPP_TESTS", build / "tests" / "mixhead_tests"))


def test_cpp_reads_python_and_python_reads_cpp(tmp_path):
    program = cpp_tests()
    if not program.is_file():
        pytest.skip(f"{program} is not built (MIXHEAD_BUILD_TESTS=ON builds it)")
    write_files(tmp_path)
    result = subprocess.run(
        [program, "--gtest_filter=Checkpoint.*"],
        env={**os.environ, "MIXHEAD_CHECKPOINTS": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    assert "[  PASSED  ] 7 tests" in result.stdout

    expected = {name: -2 * tensor for name, tensor in layer().state_dict().items()}
    state = torch.load(tmp_path / "attention_from_cpp.pt", weights_only=True)
    torch.testing.assert_close(state, expected, rtol=0, atol=0)
    attention = layer()
    attention.load_state_dict(state)
    archive = torch.jit.load(tmp_path / "attention_archive_from_cpp.pt")
    torch.testing.assert_close(dict(archive.state_dict()), expected, rtol=0, atol=0)

    expected = {name: -2 * tensor for name, tensor in kernel_layer().state_dict().items()}
    state = torch.load(tmp_path / "kernel_layer_from_cpp.pt", weights_only=True)
    torch.testing.assert_close(state, expected, rtol=0, atol=0)
    kernel_layer().load_state_dict(state)


def test_files_kept_for_cpp_are_those_of_python():
    folder = Path(__file__).parent.parent / "data"
    example = torch.load(folder / "attention_example.pt", weights_only=True)
    attention = torch.jit.load(folder / "attention_scripted.pt")
    output, _ = attention(*[example["tokens"]] * 3, memory=example["memory"])
    torch.testing.assert_close(output, example["output"])
    again = layer()
    again.load_state_dict(torch.load(folder / "attention_state.pt", weights_only=True))
    output, weights = again(*[example["tokens"]] * 3, memory=example["memory"])
    torch.testing.assert_close(output, example["output"])
    torch.testing.assert_close(weights, example["weights"])

    example = torch.load(folder / "kernel_layer_example.pt", weights_only=True)
    again = kernel_layer()
    again.load_state_dict(torch.load(folder / "kernel_layer_state.pt", weights_only=True))
    output, weights = again(*[example["tokens"]] * 3)
    torch.testing.assert_close(output, example["output"])
    torch.testing.assert_close(weights, example["weights"])


if __name__ == "__main__":
    write_files(Path(sys.argv[1]))

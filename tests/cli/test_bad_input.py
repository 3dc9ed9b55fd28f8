"""Bad usage and bad input: exit code 2, one line, what to do, and no file left."""

from __future__ import annotations

import sys

import pytest
import torch
import typer
from fastvit_cli import fuse as fuse_command
from fastvit_cli import main
from reports import names

import repcompiler as rc

CASES = [
    (["nope"], "No such command 'nope'", "--help"),
    (["fuse"], "Missing argument 'MODEL'", "fastvit fuse --help"),
    (["fuse", "fastvit_t8", "--nosuch"], "No such option: --nosuch", "--help"),
    (["fuse", "fastvit_t8", "--seed", "x"], "'--seed'", "integer"),
    (["fuse", "fastvit_t9"], "no model 'fastvit_t9'", "fastvit_t8"),
    (["fuse", "repvgg_a0"], "no model 'repvgg_a0'", "timm:repvgg_a0"),
    (["fuse", "timm:resnet5O"], "no model 'timm:resnet5O'", "timm:resnet50"),
    (["fuse", "torchvision:vgg1"], "no model", "torchvision:vgg1"),
    (["fuse", "sa12"], "no model 'sa12'", "Did you mean fastvit_sa12"),
    (["fuse", "zzzzzzzz"], "no model 'zzzzzzzz'", "fastvit models"),
    (["fuse", "missing.onnx"], "no file missing.onnx", "path"),
    (["fuse", "missing.pt2"], "no file missing.pt2", "path"),
    (["fuse", "missing.safetensors"], "missing.safetensors", ""),
    (["fuse", "best.pth"], "is a checkpoint", "--weights best.pth"),
    (["fuse", "fastvit_t8", "--pretrained"], "ships no weights", "timm:fastvit_t8"),
    (["fuse", "net.py"], "without a callable", "net.py:build"),
    (["fuse", "net.py:"], "does not name a callable", "package.module:callable"),
    (["fuse", "gone.py:build"], "no file gone.py", "path"),
    (["fuse", "no_such_pkg.sub:build"], "no Python module 'no_such_pkg'", "Install"),
    (["fuse", "os.path:jion"], "os.path has no 'jion'", "join"),
    (["fuse", "a-b:c"], "'a-b' is not the name of a Python module", ".py:callable"),
    (["fuse", "net.py:bild"], "net.py has no 'bild'", "build"),
    (["fuse", "net.py:constant"], "is of type int, not", "returns the model"),
    (["fuse", "net.py:number"], "returned type int", "torch.nn.Module"),
    (["fuse", "net.py:fails"], "ValueError: no such backbone second line", "--debug"),
    (["fuse", "broken.py:build"], "broken.py, line 1", "Mend"),
    (["fuse", "raises.py:build"], "ZeroDivisionError", "on its own"),
    (["fuse", "exits.py:build"], "SystemExit: 3", "on its own"),
    (["fuse", "net.py:build", "--pretrained"], "--pretrained", "--weights FILE"),
    (
        ["fuse", "net.py:build", "--model-arg", "depth=3"],
        "unexpected keyword",
        "--model",
    ),
    (
        ["fuse", "net.py:build", "--model-arg", "width"],
        "not key=value",
        "num_classes=10",
    ),
    (["fuse", "net.py:build", "--model-arg", "width=[1,"], "Python literal", "quotes"),
    (["fuse", "net.py:build", "--model-arg", "width={1}"], "Python literal", "Numbers"),
    (
        ["fuse", "net.py:build", "--model-arg", "a=1", "--model-arg", "a=2"],
        "twice",
        "once",
    ),
    (["fuse", "net.py:build", "--input-size", "3x"], "is not a size", "1x16000"),
    (["fuse", "net.py:build", "--input-size", "16"], "an input of 16", "3x256x256"),
    (["fuse", "net.py:build", "--input-size", "3x0x9"], "is not a size", "3x256x256"),
    (["fuse", "net.py:build", "--input-size", "1x9x9"], "3 channels", "--input-size"),
    (["fuse", "net.py:build", "--dtype", "int8"], "int8 is not known", "bfloat16"),
    (["fuse", "net.py:build", "--device", "toaster"], "--device toaster", "cpu"),
    (["fuse", "net.py:build", "--device", "meta"], "--device meta", "cpu"),
    (["fuse", "net.py:build", "--capture", "magic"], "magic", "symbolic_trace"),
    (["fuse", "net.py:build", "-o", "gone/net.pt2"], "no directory gone", "mkdir"),
    (["fuse", "net.py:build", "-o", "."], "is a directory", "inside"),
    (["fuse", "net.py:build", "-o", "net.tflite"], "'.tflite' says no format", ".onnx"),
    (["fuse", "net.py:build", "-o", "net"], "no suffix", ".pt2"),
    (["fuse", "net.py:build", "-o", "n.pt2", "-o", "./n.pt2"], "twice", "once"),
    (["fuse", "net.py:build", "--report", "r.txt"], "says no format", ".html"),
    (["fuse", "net.py:build", "--report", "r.xml"], "'.xml'", ".json"),
    (["fuse", "net.py:build", "--report", "gone/r.json"], "no directory", "mkdir"),
    (["fuse", "net.py:build", "--json", "gone/r.json"], "no directory", "mkdir"),
    (["fuse", "net.py:build", "-o", "/proc/net.pt2"], "cannot be written", "Name a"),
    (["fuse", "net.py:alone"], "missing 1 required", "returns (model, inputs)"),
    (["fuse", "net.py:no_inputs"], "example inputs that are no tensors", "(model, "),
    (["profile", "net.py:build", "--png", "/proc/zz"], "--png /proc/zz", "Name a"),
    (["models", "zzzzzzzz"], "no model 'zzzzzzzz'", "fastvit models"),
]


@pytest.fixture
def files(net, folder):
    """Factories that fail in every way, beside one that works."""
    (folder / "broken.py").write_text("def build(:\n")
    (folder / "raises.py").write_text("1 / 0\n")
    (folder / "exits.py").write_text("import sys\nsys.exit(3)\n")
    return folder


@pytest.mark.parametrize(
    ("args", "problem", "remedy"), CASES, ids=lambda v: str(v)[:40]
)
def test_bad_input_is_one_line_and_exit_code_2(
    fastvit, files, stand_in, args, problem, remedy
):
    calls = stand_in()
    before = names(files)
    result = fastvit(*args)
    assert result.code == 2
    assert result.error.startswith("Error: ")
    assert problem in result.error
    assert remedy in result.error
    assert calls == []  # found out before the long work
    assert names(files) == before


COMMANDS = typer.main.get_command(main.app).commands
ARGUMENTS = {
    "models": [],
    "fuse": ["MODEL"],
    "profile": ["MODEL"],
    "audit": ["MODEL"],
    "check": ["REFERENCE", "CANDIDATE"],
    "train": ["DATA", "--model", "MODEL"],
    "eval": ["DATA", "--model", "MODEL"],
    "predict": ["MODEL", "IMAGE"],
    "data": ["NAME", "DIR"],
}
VALUED = [
    (name, max(parameter.opts, key=len))
    for name, command in COMMANDS.items()
    for parameter in command.params
    if parameter.param_type_name == "option" and not parameter.is_flag
]


@pytest.mark.parametrize(("command", "option"), VALUED)
def test_an_option_that_is_empty_is_named(fastvit, folder, command, option):
    for empty in ("", "  "):
        result = fastvit(command, *ARGUMENTS[command], option, empty)
        assert result.code == 2
        texts = f"Error: {option} is empty. Give it a value"
        numbers = f"Error: Invalid value for '{option}'"
        assert result.error.startswith((texts, numbers))


@pytest.mark.parametrize("command", list(ARGUMENTS)[1:])
def test_an_argument_that_is_empty_is_named(fastvit, folder, command):
    for place, word in enumerate(ARGUMENTS[command]):
        if not word.startswith("-"):
            words = ARGUMENTS[command][:]
            words[place] = ""
            result = fastvit(command, *words)
            assert result.code == 2
            assert f"{word} IS EMPTY. GIVE IT A VALUE." in result.error.upper()


def test_pretrained_weights_out_of_reach_say_so(fastvit, monkeypatch):
    import timm

    def offline(name, **options):
        raise OSError("the hub cannot be reached")

    monkeypatch.setattr(timm, "create_model", offline)
    result = fastvit("fuse", "timm:test_vit", "--pretrained")
    assert result.code == 2
    assert "the hub cannot be reached" in result.error
    assert "--pretrained needs published weights and the network" in result.error


def test_cuda_that_is_not_there_is_named(fastvit, net, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    result = fastvit("fuse", net, "--device", "cuda")
    assert result.code == 2
    assert "--device cuda cannot be used here" in result.error


@pytest.mark.parametrize("error", ["CaptureError", "NotEval", "UnsupportedInput"])
def test_what_the_compiler_refuses_is_bad_input(fastvit, net, folder, stand_in, error):
    kind = getattr(rc, error)
    stand_in(error=kind("It branches on a value.", hint="Rewrite the branch."))
    before = names(folder)
    result = fastvit("fuse", net, "-o", "net.pt2")
    assert result.code == 2
    assert result.error == (
        "Error: net.py:build: It branches on a value. Rewrite the branch."
    )
    assert names(folder) == before


def test_a_check_that_cannot_be_made_is_a_failed_job(fastvit, net, stand_in):
    stand_in(error=rc.VerificationError("It does not run."))
    result = fastvit("fuse", net)
    assert result.code == 1
    assert "It does not run." in result.error


def test_a_fault_of_the_command_is_no_traceback(fastvit, net, stand_in):
    stand_in(error=AssertionError("broken invariant"))
    result = fastvit("fuse", net)
    assert result.code == 1
    assert "AssertionError: broken invariant" in result.error
    assert "--debug" in result.error


def test_debug_shows_the_traceback(fastvit, net, stand_in):
    stand_in(error=AssertionError("broken invariant"))
    result = fastvit("fuse", net, "--debug")
    assert result.code == 1
    assert "Traceback (most recent call last)" in result.err


def test_ctrl_c_ends_silently_with_130(fastvit, net, folder, stand_in):
    stand_in(error=KeyboardInterrupt())
    before = names(folder)
    result = fastvit("fuse", net, "-o", "net.pt2")
    assert (result.code, result.out, result.err) == (130, "", "")
    assert names(folder) == before


def test_a_model_that_cannot_take_its_own_default_size_says_what_to_do(fastvit, net):
    result = fastvit("fuse", net, "--input-size", "4x16x16")
    assert result.code == 2
    assert "net.py:build cannot take an input of 4x16x16 in float32" in result.error
    assert "expected input" in result.error


def test_no_command_shows_the_help(fastvit):
    result = fastvit()
    assert result.code == 2
    assert "fuse" in result.out
    assert result.err == ""


def test_help_has_examples_and_version_works_everywhere(fastvit):
    for command in ("fuse", "models"):
        shown = fastvit(command, "--help")
        assert shown.code == 0
        assert "Examples" in shown.out
        assert f"fastvit {command}" in shown.out
        version = fastvit(command, "--version")
        assert (version.code, version.out) == (0, fastvit("--version").out)
    assert fastvit("--version").out.startswith("fastvit ")


def test_fuse_has_at_most_ten_options_of_its_own():
    import inspect

    common = {"version", "debug", "quiet", "json_target", "weights", "model_arg"}
    common |= {"pretrained", "input_size", "seed", "device", "dtype", "model"}
    common |= {"verbose"}  # as --quiet is
    own = set(inspect.signature(fuse_command.fuse).parameters) - common
    assert len(own) <= 10


PARTLY_TRACED = """
import torch
from torch import nn


class Net(nn.Module):
    default_input_size = (3, 8, 8)

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x):
        y = self.body(x)
        return y if float(y.detach().mean()) > 1e6 else y.relu()
"""


def test_a_certificate_of_a_model_without_one_graph_is_refused(fastvit, folder):
    (folder / "partly.py").write_text(PARTLY_TRACED)
    result = fastvit("fuse", "partly.py:Net", "--certificate", "c.json")
    assert result.code == 2
    assert "has no graph as a whole" in result.err
    assert not (folder / "c.json").exists()


def test_an_onnx_graph_without_onnxruntime_says_how_to_get_it(
    fastvit, net, folder, monkeypatch
):
    assert fastvit("fuse", net, "-o", "net.onnx").code == 0
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = fastvit("profile", "net.onnx", "--backend", "openvino")
    assert result.code == 2
    assert "net.onnx is an ONNX graph" in result.error
    assert "pip install onnxruntime" in result.error

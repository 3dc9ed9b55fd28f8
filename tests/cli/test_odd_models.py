"""Models that are no plain function of one image, and certificates from anywhere."""

from __future__ import annotations

import json

import pytest

from repcompiler.certify import digest

ODD = """
import sys
import torch
from torch import nn

class Base(nn.Module):
    input_size = (3, 8, 8)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)
        nn.init.uniform_(self.norm.running_mean, -1, 1)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def features(self, x):
        return torch.relu(self.norm(self.conv(x)))

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))

class Dropping(Base):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, training=True)

class Counting(Base):
    calls = 0
    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls

class Exits(Base):
    def forward(self, x):
        sys.exit(0)

class ExitsLate(Base):
    def forward(self, x):
        return super().forward(x) if x.abs().max() < 100 else sys.exit(0)

class Named(Base):
    def forward(self, x):
        return {"a": super().forward(x)}

class Renamed(Base):
    def forward(self, x):
        return {"b": super().forward(x)}

class Three(Base):
    number = 3.0
    def forward(self, x):
        return super().forward(x), self.number

class Four(Three):
    number = 4.0

class Complex(Base):
    def forward(self, x):
        return torch.fft.fft2(self.features(x))

class Conjugate(Base):
    def forward(self, x):
        y = torch.fft.fft2(self.features(x))
        return torch.complex(y.real, -y.imag)

class Sparse(Base):
    def forward(self, x):
        return super().forward(x).to_sparse()

class Eight(Base):
    def forward(self, x):
        return super().forward(x).to(torch.float8_e4m3fn)

class Unsigned(Base):
    def forward(self, x):
        return super().forward(x).abs().to(torch.uint16)
"""


@pytest.fixture
def ask(fastvit, folder):
    """Runs `fastvit check` on two of the models above, or on files."""
    (folder / "odd.py").write_text(ODD)

    def named(name):
        return name if "." in name else f"odd.py:{name}"

    def run(reference, candidate, *more):
        pair = (named(reference), named(candidate))
        result = fastvit("check", *pair, "--samples", "1", "--json", "c.json", *more)
        assert "fault of the command" not in result.err
        assert "Traceback" not in result.err
        return result

    return run


@pytest.mark.parametrize("model", ["Dropping", "Counting"])
def test_what_changes_from_run_to_run_hides_no_other_function(ask, folder, model):
    result = ask(model, "Base")
    assert result.code == 1
    assert "another output when it is run again" in result.error
    assert json.loads((folder / "c.json").read_text())["verdict"] == "not comparable"


def test_a_model_that_leaves_python_is_not_called_equal(ask):
    assert ask("Base", "Exits").code == 2
    late = ask("Base", "ExitsLate")
    assert late.code == 1
    assert "sys.exit(0)" in late.err or "SystemExit" in late.err


@pytest.mark.parametrize(
    ("reference", "candidate"),
    [("Named", "Renamed"), ("Named", "Base"), ("Three", "Four"), ("Three", "Base")],
)
def test_what_is_around_the_tensors_counts(ask, reference, candidate):
    assert ask(reference, reference).code == 0
    result = ask(reference, candidate)
    assert result.code == 1
    assert "structure of the output: it returns" in result.err


@pytest.mark.parametrize("model", ["Complex", "Sparse", "Eight", "Unsigned"])
def test_tensors_of_every_kind_are_compared(ask, model):
    assert ask(model, model).code == 0


def test_the_imaginary_part_counts(ask, folder):
    assert ask("Complex", "Conjugate").code == 1
    cases = json.loads((folder / "c.json").read_text())["cases"]
    assert cases[0]["verdict"] == "different"
    assert cases[0]["error_ratio"] > 1e3


def test_an_exporter_that_folds_in_float32_is_no_fault(ask, folder):
    import sys

    import torch

    ask("Base", "Base")
    net = sys.modules["_fastvit_odd"].Base().eval()
    options = {"dynamo": True, "verbose": False}
    torch.onnx.export(net, (torch.zeros(1, 3, 8, 8),), "n.onnx", **options)
    assert ask("Base", "n.onnx").code == 0
    with torch.no_grad():
        net.norm.weight[1] *= 1 + 1e-5
    torch.onnx.export(net, (torch.zeros(1, 3, 8, 8),), "n.onnx", **options)
    result = ask("Base", "n.onnx")
    assert result.code == 1
    assert "output channel 1" in result.err


def test_a_graph_without_inputs_is_refused_and_a_scalar_is_run(ask):
    import onnx
    from onnx import TensorProto, helper

    def write(path, node, inputs, shape):
        out = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
        graph = helper.make_graph([node], "g", inputs, [out])
        opset = [helper.make_opsetid("", 18)]
        made = helper.make_model(graph, opset_imports=opset, ir_version=9)
        onnx.save(made, path)

    one = helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0])
    write("c.onnx", helper.make_node("Constant", [], ["y"], value=one), [], [1])
    assert "takes no input" in ask("c.onnx", "c.onnx").error
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [])
    write("s.onnx", helper.make_node("Identity", ["x"], ["y"]), [x], [])
    assert ask("s.onnx", "s.onnx").code == 0


def test_programs_of_two_batch_sizes_share_no_input(ask, folder):
    import sys

    import torch

    ask("Base", "Base")
    net = sys.modules["_fastvit_odd"].Base().eval()
    for name, batch in (("one.pt2", 1), ("two.pt2", 2)):
        program = torch.export.export(net, (torch.zeros(batch, 3, 8, 8),))
        torch.export.save(program, name)
    result = ask("one.pt2", "two.pt2")
    assert result.code == 1
    assert "no input could be compared" in result.err
    assert ask("Base", "two.pt2").code == 0


def region(change):
    """A change of the first region."""
    return lambda document: change(document["regions"][0])


def first_op(**values):
    """A change of the first op of the first region."""
    return region(lambda row: row["candidate"]["ops"][0].update(values))


MALFORMED = {
    "regions are no list": (2, lambda d: d.update(regions=None)),
    "a region is no object": (2, lambda d: d["regions"].append("a")),
    "a region twice": (2, lambda d: d["regions"].append(d["regions"][0])),
    "a name that is a list": (2, region(lambda row: row.update(name=[]))),
    "a bound that is no number": (
        2,
        region(lambda row: row.update(bound=float("nan"))),
    ),
    "an unknown dtype": (2, region(lambda row: row.update(dtype="nn"))),
    "no reference": (2, region(lambda row: row.pop("reference"))),
    "ops that are texts": (2, region(lambda r: r["candidate"].update(ops=["a"]))),
    "a batch of a thousand million": (2, lambda d: d["sizes"][0].__setitem__(0, 10**9)),
    "another version": (2, lambda d: d.update(format=f"{d['format'][:-1]}1")),
    "an unknown op": (1, first_op(op="eval")),
    "an op that reads itself": (1, first_op(args=["o0"])),
    "a negative stride": (1, first_op(stride=[-1, -1])),
    "a stride that no machine holds": (1, first_op(stride=[10**30, 1])),
    "a weight that is a list": (1, first_op(weight=[])),
    "groups that are no number": (1, first_op(groups="zz")),
    "a node that there is not": (
        1,
        region(lambda row: row["reference"].update(nodes=["gone"])),
    ),
}


@pytest.fixture(scope="module")
def certified(tmp_path_factory):
    """A folder with the models, a fused file and its certificate."""
    from fastvit_cli import main

    place = tmp_path_factory.mktemp("certified")
    (place / "odd.py").write_text(ODD)
    source, out, told = (str(place / f) for f in ("odd.py", "n.safetensors", "n.json"))
    args = ["fuse", f"{source}:Base", "-o", out, "--certificate", told, "--quiet"]
    assert main.run(args) == 0
    return source, out, json.loads((place / "n.json").read_text())


@pytest.mark.parametrize("fault", list(MALFORMED))
def test_a_malformed_certificate_holds_for_nothing(fastvit, folder, certified, fault):
    source, out, document = certified
    code, change = MALFORMED[fault]
    document = json.loads(json.dumps(document))
    change(document)
    document["digest"] = digest(document)
    (folder / "bad.json").write_text(json.dumps(document))
    args = (f"{source}:Base", out, "--samples", "1", "--certificate", "bad.json")
    result = fastvit("check", *args)
    assert result.code == code, result.err
    assert "certificate" in result.error
    assert "fault of the command" not in result.err


def test_a_certificate_nested_too_deep_is_refused(fastvit, folder, certified):
    source, out, _ = certified
    (folder / "bad.json").write_text("[" * 200_000)
    result = fastvit("check", f"{source}:Base", out, "--certificate", "bad.json")
    assert result.code == 2
    assert "cannot be read" in result.error


@pytest.mark.parametrize(
    ("result", "shown"), [("{'y': x, 'name': 'abc'}", "'abc'"), ("(x, 3)", "3")]
)
def test_a_graph_of_more_than_tensors_is_no_onnx_file(fastvit, folder, result, shown):
    body = f"lambda s, x: {result.replace('x', 's[0](x)')}"
    (folder / "more.py").write_text(
        "from torch import nn\n"
        f"Net = type('Net', (nn.Sequential,), {{'forward': {body}}})\n"
        "build = lambda: Net(nn.Conv2d(3, 4, 1)).eval()\n"
    )
    found = fastvit("fuse", "more.py:build", "--input-size", "3x6x6", "-o", "x.onnx")
    assert found.code == 1
    assert f"it returns {shown}, and a graph returns tensors only" in found.err
    assert found.err.count("\n") == 1 and "\x1b" not in found.err
    assert not (folder / "x.onnx").exists()

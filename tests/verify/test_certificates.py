"""A certificate holds for the models it was written for, and for nothing else."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from equality import Branches, conv, draw, randomise
from fastvit_cli.certificates import verify
from fastvit_cli.runners import of
from fastvit_cli.sources import Loaded
from torch import nn

import repcompiler as rc
from repcompiler.certify import check_digest, digest
from repcompiler.certops import bound_of, run_ops

INPUT = (2, 4, 9, 9)


def runner(model: nn.Module):
    """A model as the command has it."""
    from fastvit_cli.card import Card

    card = Card("net", {"input_size": INPUT[1:]}, weights={"origin": "factory"})
    return of(Loaded("net", model, (draw(INPUT).float(),), card, "float32", "cpu"))


@pytest.fixture(scope="module")
def case():
    """Reference, fused model and certificate of a small net with three regions."""
    net = randomise(
        nn.Sequential(
            Branches(conv(), nn.Conv2d(4, 4, 1), skip=True),
            nn.ReLU(),
            conv(padding_mode="reflect"),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1),
            nn.BatchNorm2d(6),
        )
    ).float()
    result = rc.fuse(net, (draw(INPUT).float(),), certify=True)
    return net, result.model, json.loads(json.dumps(result.certificate))


def check(case, **changes):
    """What re-verifying finds, with some of the three replaced."""
    net, fused, document = case
    given = {"net": net, "fused": fused, "document": document, **changes}
    return verify(given["document"], runner(given["net"]), runner(given["fused"]))


def test_a_certificate_holds_and_its_bounds_are_above_what_is_measured(case):
    found = check(case)
    assert found.problems == []
    assert len(found.rows) == len(case[2]["regions"]) >= 3
    for row in found.rows:
        assert row.bound is not None
        assert row.exactness < 1e-7
        assert 0 < row.measured < row.bound < 1e-4


def numbers(value, path=()):
    """The path of every number in a document."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from numbers(item, (*path, index))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path


def changed(document, path):
    """The document with one number moved."""
    other = copy.deepcopy(document)
    place = other
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] += 1
    return other


def test_every_number_that_is_changed_is_caught(case):
    paths = list(numbers(case[2]))
    assert len(paths) > 30
    for path in paths:
        assert check_digest(changed(case[2], path)), path
    assert check(case, document=changed(case[2], paths[3])).problems


def forged(document, change):
    """A changed document with a digest that fits it."""
    other = copy.deepcopy(document)
    change(other["regions"][0])
    return {**other, "digest": digest(other)}


FORGERIES = {
    "bound": lambda row: row.update(bound=row["bound"] / 10),
    "exactness": lambda row: row.update(exactness=1e-3),
    "fingerprint": lambda row: row["candidate"]["tensors"].update(
        dict.fromkeys(row["candidate"]["tensors"], "0" * 64)
    ),
    "stride": lambda row: _first(row).update(stride=[2, 2]),
    "padding": lambda row: _first(row).update(padding=[0, 0]),
    "mode": lambda row: _first(row).update(mode="replicate"),
    "bias": lambda row: _first(row).update(bias=None),
    "node": lambda row: row["reference"].update(nodes=row["reference"]["nodes"][1:]),
}


def _first(row):
    return next(op for op in row["candidate"]["ops"] if op.get("weight"))


class Bytes(nn.Module):
    """Takes whole numbers to float32 by itself, in whatever dtype its weights are."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(4)

    def forward(self, x):
        """The norm of the conv."""
        return self.norm(self.conv(x.float() / 255))


def test_a_certificate_of_a_model_that_names_its_dtype_holds():
    net = randomise(Bytes()).float()
    result = rc.fuse(net, (draw(INPUT).float(),), certify=True)
    found = verify(result.certificate, runner(net), runner(result.model))
    assert (found.problems, len(found.rows)) == ([], 1)
    net.norm.bias.data += 1
    assert not verify(result.certificate, runner(net), runner(result.model)).ok


@pytest.mark.parametrize("claim", list(FORGERIES))
def test_a_false_claim_is_caught_even_with_a_digest_that_fits(case, claim):
    document = forged(case[2], FORGERIES[claim])
    assert check_digest(document) == ""
    assert check(case, document=document).problems != []


def test_a_region_that_is_left_out_is_missed(case):
    document = copy.deepcopy(case[2])
    left_out = document["regions"].pop(1)
    document["digest"] = digest(document)
    problems = check(case, document=document).problems
    assert len(problems) == len(left_out["candidate"]["tensors"]) == 2
    for name in left_out["candidate"]["tensors"]:
        assert any(p.startswith(name) and "in no region" in p for p in problems)


def test_ops_that_ask_for_any_memory_are_refused_before_they_run(case):
    pad = {"op": "pad", "args": ["s0", [1 << 28, 1 << 28]], "kwargs": {}}
    with pytest.raises(ValueError, match="numbers"):
        bound_of([pad], {}, torch.float32, [(1, 4)])
    double = [{"op": "cat", "args": [["s0", "s0"]], "kwargs": {}}]
    double += [{"op": "cat", "args": [[f"o{n}"] * 2], "kwargs": {}} for n in range(40)]
    with pytest.raises(ValueError, match="numbers"):
        bound_of(double, {}, torch.float32, [(1, 4)])

    def ask(row):
        _first(row)["padding"] = [1 << 20, 1 << 20]

    assert check(case, document=forged(case[2], ask)).problems != []


def test_another_candidate_or_reference_is_named(case):
    net, fused, _ = case
    other = copy.deepcopy(fused)
    name, weight = next(iter(other.named_parameters()))
    with torch.no_grad():
        weight.view(-1)[0] *= 1 + 1e-6
    problems = check(case, fused=other).problems
    assert any(name in problem for problem in problems)
    moved = copy.deepcopy(net)
    with torch.no_grad():
        moved[3].running_mean[0] += 1e-3
    assert any("reference's" in problem for problem in check(case, net=moved).problems)


def test_the_bound_counts_every_term_of_the_longest_sum():
    kernel, bias = torch.ones(2, 3, 3, 3), torch.ones(2)
    layer = {"op": "conv2d", "stride": 1, "padding": [1, 1], "dilation": 1}
    layer |= {"groups": 1, "mode": "zeros", "args": ["s0"], "weight": "w", "bias": "b"}
    ops = [
        layer,
        {"op": "narrow", "args": ["s0", 1, 0, 2], "kwargs": {}},
        {"op": "add", "args": ["o0", "o1"], "kwargs": {}},
    ]
    unit = torch.finfo(torch.float32).eps / 2
    # 27 products summed, a bias, one rounding of the kernel, one add.
    reach = (27 + 1 + 1 + 1) * unit
    held = {"w": kernel, "b": bias}
    found = bound_of(ops, held, torch.float32, [(1, 3, 5, 5)])
    assert found == pytest.approx(reach / (1 - reach))
    long = {"w": torch.ones(1, 300), "b": bias}
    linear = [{"op": "linear", "args": ["s0"], "weight": "w", "bias": None}]
    assert bound_of(linear, long, torch.bfloat16, [(2, 300)]) is None


def test_ops_are_run_as_torch_runs_them():
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2).double()
    op = {
        "op": "conv_transpose2d",
        "args": ["s0"],
        "weight": "w",
        "bias": "b",
        "stride": [2, 2],
        "padding": [1, 1],
        "output_padding": [0, 0],
        "dilation": [1, 1],
        "groups": 2,
        "mode": "zeros",
    }
    x = draw((1, 4, 5, 5)).double()
    found = run_ops([op], [x], {"w": layer.weight, "b": layer.bias})
    assert torch.equal(found, layer(x))


def test_sizes_in_layout_ops_follow_the_batch_that_they_were_taken_at():
    import timm

    net = randomise(timm.create_model("fastvit_sa12", num_classes=4)).float()
    x = torch.randn(1, 3, 64, 64)
    result = rc.fuse(net, (x,), certify=True)
    card = runner(net).card
    pair = [
        of(Loaded(name, model, (x,), card, "float32", "cpu"))
        for name, model in (("net", net), ("fused", result.model))
    ]
    found = verify(json.loads(json.dumps(result.certificate)), *pair)
    assert found.problems == []
    assert found.open == []


def test_a_region_with_views_that_sizes_are_asked_of_is_re_verified():
    """Of LeViT's kind: the shape of a view, whose twin the compiler asks instead."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.norm = nn.Linear(4, 12, bias=False), nn.BatchNorm1d(12)
            self.out = nn.Linear(4, 4)

        def forward(self, x):
            rows = x.flatten(2).transpose(1, 2)
            made = self.norm(self.rows(rows).flatten(0, 1)).reshape(*rows.shape[:2], 12)
            n, length, _ = made.shape
            q, k, v = made.view(n, length, 3, 4).unbind(2)
            return self.out((q @ k.transpose(1, 2)).softmax(-1) @ v)

    net, x = randomise(Attention()).float(), (draw(INPUT).float(),)
    result = rc.fuse(net, x, certify=True)
    assert result.report.regions
    document = json.loads(json.dumps(result.certificate))
    assert check((net, result.model, document)).problems == []


PADDED = {
    "mirrored": nn.ReflectionPad2d((1, 2, 0, 1)),
    "repeated": nn.ReplicationPad2d(1),
    "wrapped": nn.CircularPad2d(1),
    "resized": nn.UpsamplingNearest2d(scale_factor=2),
}


@pytest.mark.parametrize("kind", PADDED)
def test_modules_between_a_norm_and_its_conv_are_re_verified(kind):
    net = randomise(
        nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), PADDED[kind], nn.Conv2d(4, 6, 3))
    ).float()
    result = rc.fuse(net, (draw(INPUT).float(),), certify=True)
    assert result.report.ops.after_by_type["batch_norm"] == 0
    document = json.loads(json.dumps(result.certificate))
    assert len(document["regions"]) == 1
    found = check((net, result.model, document))
    assert found.problems == [] and found.open == []


def test_an_axis_that_was_moved_is_re_verified():
    class Moved(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 5)

        def forward(self, x):
            return self.head(torch.movedim(self.norm(x.relu()), 1, -1))

    net = randomise(Moved()).float()
    result = rc.fuse(net, (draw(INPUT).float(),), certify=True)
    assert result.report.ops.after_by_type["batch_norm"] == 0
    found = check((net, result.model, json.loads(json.dumps(result.certificate))))
    assert found.problems == [] and found.open == []


def test_the_command_writes_and_re_verifies_it(tmp_path, monkeypatch):
    from fastvit_cli import main

    monkeypatch.chdir(tmp_path)
    text = "from torch import nn\ndef build():\n    return nn.Sequential("
    text += "nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())\n"
    (tmp_path / "small.py").write_text(text)
    size = ("--input-size", "3x8x8", "--quiet")
    files = ("-o", "s.onnx", "-o", "s.pt2", "--certificate", "c.json")
    assert main.run(["fuse", "small.py:build", *size, *files]) == 0
    for candidate in ("s.onnx", "s.pt2"):
        args = ["check", "small.py:build", candidate, "--certificate", "c.json", *size]
        assert main.run(args) == 0
    wrong = json.loads((tmp_path / "c.json").read_text())
    wrong["regions"][0]["bound"] *= 0.99
    (tmp_path / "c.json").write_text(json.dumps(wrong))
    assert main.run(args) == 1
    (tmp_path / "c.json").write_text("{}")
    assert main.run(args) == 2
    assert main.run(["fuse", "small.py:build", "--no-verify", *files[4:]]) == 2

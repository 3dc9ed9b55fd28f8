"""What people and machines read: JSON alone on stdout, plain text off a terminal."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest
from fastvit_cli import render
from fastvit_cli.card import Card
from reports import EQUAL, make_region, make_report
from rich.console import Console

from repcompiler.report import Kept, VerifyReport

SCHEMA = {
    "schema",
    "model",
    "input_size",
    "capture",
    "ops",
    "params",
    "macs",
    "regions",
    "kept",
    "equivalence",
    "seconds",
    "outputs",
    "weights",
    "versions",
}
MANY = tuple(
    make_region(f"stages.{stage}.blocks.{block}.{part}", kind)
    for stage in range(4)
    for block in range(9)
    for part, kind in (("token_mixer", "repmixer"), ("mlp", "conv_bn"))
)


def shown(report, *, width=80, verbose=False, terminal=False) -> str:
    """The rendering of a report."""
    out = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=terminal,
        highlight=False,
        markup=False,
    )
    loaded = SimpleNamespace(
        name="fastvit_t8",
        dtype="float32",
        device="cpu",
        notes=(),
        card=Card(
            "fastvit_t8",
            {"input_size": [3, 256, 256]},
            weights={"origin": "random", "seed": 0},
        ),
    )
    render.fusion(out, loaded, report, {"outputs": []}, verbose=verbose)
    return out.file.getvalue()


def test_json_on_stdout_is_alone_there(fastvit, net, stand_in):
    stand_in()
    result = fastvit("fuse", net, "--json", "-")
    document = json.loads(result.out)
    assert document.keys() >= SCHEMA
    assert document["schema"] == 1
    assert list(document)[:3] == ["schema", "model", "input_size"]
    assert document["model"] == "net.py:build"
    assert document["input_size"] == [3, 16, 16]
    assert document["ops"]["after_by_type"] == {"convolution": 8}
    assert document["regions"][0].keys() >= {
        "name",
        "kind",
        "removed",
        "added",
        "exactness",
    }
    assert document["kept"][0]["reason"] == "dearer"
    assert document["seconds"] == {"capture": 0.1, "fuse": 0.2, "verify": 0.3}
    assert "2 regions fused" in result.err


def test_json_file_and_report_hold_the_same(fastvit, net, folder, stand_in):
    stand_in()
    outputs = ("-o", "n.safetensors", "--report", "r.json", "--json", "j.json")
    result = fastvit("fuse", net, *outputs)
    assert result.code == 0
    assert "2 regions fused" in result.out
    report = json.loads((folder / "r.json").read_text())
    assert report == json.loads((folder / "j.json").read_text())
    assert report["outputs"][0]["path"] == "n.safetensors"


def test_json_has_null_for_what_is_no_number(fastvit, net, stand_in):
    verdict = VerifyReport(True, "equal", error_ratio=float("inf"))
    stand_in(make_report(verdict))
    text = fastvit("fuse", net, "--json", "-").out
    assert "Infinity" not in text
    assert json.loads(text)["equivalence"]["error_ratio"] is None


def test_quiet_prints_nothing(fastvit, net, stand_in):
    stand_in()
    result = fastvit("fuse", net, "--quiet")
    assert (result.code, result.out, result.err) == (0, "", "")
    machine = fastvit("fuse", net, "--quiet", "--json", "-")
    assert machine.err == ""
    assert json.loads(machine.out)["schema"] == 1


def test_output_off_a_terminal_is_plain(fastvit, net, stand_in):
    stand_in()
    result = fastvit("fuse", net)
    assert "\x1b" not in result.out + result.err


def test_no_color_is_plain_on_a_terminal_too(fastvit, net, stand_in, monkeypatch):
    stand_in()
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any stream as a terminal
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b" in fastvit("fuse", net).out
    monkeypatch.setenv("NO_COLOR", "1")
    result = fastvit("fuse", net)
    assert "\x1b" not in result.out + result.err


def test_the_stage_is_shown_on_a_terminal(net, monkeypatch, capsys):
    from fastvit_cli.console import open_screen

    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with open_screen("-", quiet=False, debug=False).working("net") as stage:
        stage("capture")
    captured = capsys.readouterr()
    assert "net: capture" in captured.err
    assert captured.out == ""


def test_the_compiler_gets_the_options(fastvit, net, stand_in):
    calls = stand_in()
    fastvit("fuse", net, "--no-verify", "--capture", "export")
    assert calls[0]["verify"] is False
    assert calls[0]["capture"] == "export"
    assert callable(calls[0]["progress"])


def test_no_verify_writes_and_says_that_nothing_was_checked(
    fastvit, net, folder, stand_in
):
    stand_in(make_report(VerifyReport(False, "not checked", note="verify=False")))
    result = fastvit("fuse", net, "--no-verify", "-o", "n.safetensors")
    assert result.code == 0
    assert "NOT CHECKED" in result.out
    assert (folder / "n.safetensors").exists()


def test_each_region_has_a_line_with_its_figures():
    text = shown(make_report())
    (line,) = [line for line in text.splitlines() if line.lstrip().startswith("stem")]
    assert line.split() == ["stem", "conv_bn", "2", "→", "1", "1.0e-15"]
    assert "2 regions fused" in text


@pytest.mark.parametrize("width", [80, 160])
@pytest.mark.parametrize("verbose", [False, True])
def test_lines_fit_the_terminal(width, verbose):
    text = shown(make_report(regions=MANY), width=width, verbose=verbose)
    assert max(map(len, text.splitlines())) <= width


def test_many_regions_are_counted_by_stage_and_kind():
    text = shown(make_report(regions=MANY))
    assert len(text.splitlines()) < 40
    (line,) = [line for line in text.splitlines() if "stages.2" in line]
    assert line.split() == ["stages.2", "repmixer", "9", "18", "→", "9", "1.0e-15"]
    assert "--verbose" in text


def test_verbose_lists_every_region():
    text = shown(make_report(regions=MANY), verbose=True, width=120)
    assert all(region.name in text for region in MANY)


def test_the_worst_exactness_of_a_group_counts():
    regions = (*MANY[:50], make_region("stages.0.blocks.0.x", "repmixer", 3e-10))
    (line,) = [
        line
        for line in shown(make_report(regions=regions)).splitlines()
        if "stages.0" in line
    ]
    assert line.split()[-1] == "3.0e-10"


def test_a_region_that_was_not_checked_says_so():
    text = shown(make_report(regions=(make_region("stem", exactness=None),)))
    assert "not checked" in text


def test_stages_are_first_parts_unless_one_holds_most():
    resnet = [make_region(f"layer{i}.{j}.conv") for i in (1, 2, 3) for j in (0, 1)]
    assert list(render.group(resnet)) == ["layer1", "layer2", "layer3"]
    assert list(render.group(MANY)) == [f"stages.{i}" for i in range(4)]
    assert list(render.group([make_region("")])) == ["(root)"]


def test_no_region_is_said_plainly():
    assert "Nothing to fuse" in shown(make_report(regions=()))


def test_kept_ops_are_counted_by_reason():
    kept = [Kept(f"fc{i}", "linear", "dearer", "it costs more") for i in range(9)]
    kept += [Kept("norm", "batch_norm", "padded_border", "the next conv pads")]
    text = shown(make_report(kept=tuple(kept)), width=160)
    assert "10 affine ops stay" in text
    (line,) = [line for line in text.splitlines() if "(dearer)" in line]
    assert "9 linear" in line
    assert "it costs more" in line
    assert "fc0, fc1, fc2 and 6 more" in line
    assert "1 batch_norm" in text


def test_totals_show_before_after_and_change():
    lines = {
        line.split()[0]: line.split()[1:]
        for line in shown(make_report()).splitlines()
        if line.strip()
    }
    assert lines["ops"] == ["50", "20", "-60.0%"]
    assert lines["parameters"] == ["4.026", "M", "3.99", "M", "-0.9%"]
    assert lines["MACs"] == ["700", "M", "687", "M", "-1.9%"]


@pytest.mark.parametrize(
    ("verdict", "begins", "holds"),
    [
        (EQUAL, "Equal: ", "exactness 1.0e-13 in float64"),
        (VerifyReport(False, "different", max_abs=2.0), "NOT EQUAL: ", "2.0e+00"),
        (VerifyReport(False, "not checked"), "NOT CHECKED", "skipped"),
        (
            VerifyReport(False, "not comparable", note="not finite"),
            "Not comparable: ",
            "not finite",
        ),
        (VerifyReport(True, "regions equal", 1e-15), "Regions equal: ", "1.0e-15"),
    ],
)
def test_the_verdict_is_one_line(verdict, begins, holds):
    line = str(render.verdict(verdict))
    assert line.startswith(begins)
    assert holds in line


def test_names_are_never_markup():
    text = shown(make_report(regions=(make_region("a.[red]b"),)))
    assert "a.[red]b" in text


def test_counts_are_short():
    assert [render.human(n) for n in (None, 0, 9999, 12_345, 4_026_232, 7 * 10**9)] == [
        "?",
        "0",
        "9999",
        "12.35 k",
        "4.026 M",
        "7 G",
    ]


def test_models_lists_ours_and_counts_the_rest(fastvit):
    result = fastvit("models")
    assert result.code == 0
    assert "fastvit_ma36" in result.out.splitlines()
    assert "timm:NAME" in result.out


def test_models_narrows_by_part_or_pattern(fastvit):
    part = fastvit("models", "mobileone_s").out.splitlines()
    assert "timm:mobileone_s0" in part
    pattern = fastvit("models", "resnet?8").out.splitlines()
    assert pattern == ["timm:resnet18", "torchvision:resnet18"]


def test_models_as_json(fastvit):
    document = json.loads(fastvit("models", "--json", "-").out)
    assert document["schema"] == 1
    assert {"name": "fastvit_t8", "family": "fastvit"} in document["models"]
    families = {row["family"] for row in document["models"]}
    assert families == {"fastvit", "timm", "torchvision"}

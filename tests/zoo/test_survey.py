"""The survey's page says what its records hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import packages
import pytest
import survey
import torch
import twins
from helpers import randomise
from settling import settle
from survey import compared, wanted
from survey_report import best_peer, page
from torch import Tensor, nn

RECORD = {
    "stamp": "timm torch abc",
    "status": "equal",
    "family": "a",
    "params": 10,
    "door": "symbolic_trace",
    "ops": [10, 4],
    "norms": [3, 0],
    "peers": {"timm": 3, "torch": "wrong (1e-01)", "both": 5},
    "error_ratio": 1.25,
    "exactness": 1e-15,
    "seconds": {"capture": 1.0, "fuse": 2.0, "lower": 1.5, "verify": 0.5},
    "leftovers": ["batch_norm bn"],
    "kept": {"batch_norm: no_neighbour": 2},
}
LARGE = {"stamp": "timm torch abc", "status": "too large", "captured": "export"}
FAILED = {"stamp": "timm torch abc", "status": "error", "note": "a | b"}


def test_page_counts_what_the_records_hold() -> None:
    text = page({"timm:a": RECORD, "timm:b": FAILED})
    assert "Versions: timm, torch. Compiler sources: `abc` (2 models)." in text
    assert "| verdict: equal | 1 |" in text
    assert "| batch norms after | 0 |" in text
    assert "| timm:a | 4 | 3 |" in text
    assert "| timm:b | error | abc | a / b |" in text
    assert "| batch_norm: no_neighbour | 2 |" in text
    assert "median 3.0 s over 1 models, 0 over 60 s" in text
    assert "| timm | 2 | 1 | 0 | 0 | 1 | 1 | 0 | 0 | 3 | 0 | 10 | 4 |" in text
    assert "| timm:a | batch_norm bn |" in text


def test_page_tells_where_the_doors_differ() -> None:
    def by_export(status: str, **more: object) -> dict:
        return {**RECORD, "export": {"status": status, **more}}

    text = page(
        {
            "timm:same": by_export("equal", ops=4),
            "timm:more": by_export("equal", ops=5, differs={"mul": [1, 2]}),
            "timm:wrong": by_export("different", ops=4),
            "timm:closed": by_export("closed"),
            "timm:untried": RECORD,
        }
    )
    assert "Of 4 models" in text and "opens for 3." in text and "in 1.\n" in text
    assert "| timm:more | 4 | 5 | equal | mul 1, 2 |" in text
    assert "| timm:wrong | 4 | 4 | different |  |" in text
    assert "| timm:same | 4 | 4 |" not in text


def test_page_counts_what_was_captured_without_weights() -> None:
    lost = {**LARGE, "captured": None}
    text = page({"timm:a": LARGE, "timm:b": lost, "timm:c": RECORD})
    assert "| of the too large, captured without weights | 1 |" in text


def test_page_compares_every_peer_on_the_first_of_each_family() -> None:
    second = {**RECORD, "peers": {"both": 5}}
    plain = {**RECORD, "norms": [0, 0], "family": "c"}
    larger = {**RECORD, "params": 11}
    text = page(
        {
            "timm:a": RECORD,
            "timm:b": second,
            "timm:c": plain,
            "timm:0": larger,
            "smp:d": RECORD,
        }
    )
    assert "1 models: 10 ops before, ours 4." in text
    assert "On the 0 that `torch` takes and keeps equal, it leaves 0 of 0" in text
    assert "On the 1 that `both` takes and keeps equal, it leaves 5 of 10" in text
    assert "| timm:a | 10 | 3 | wrong (1e-01) | 5 | 4 |" in text
    assert "| timm:b | 10" not in text


def test_page_names_what_was_cut_short() -> None:
    text = page({"timm:a": {**RECORD, "unfinished": "over 300 s"}, "timm:b": RECORD})
    assert "Not done within the limits, after the verdict: timm:a." in text


def net(kernel: int = 3, slope: float = 0.1, numbers: float = 1.0) -> nn.Module:
    body = nn.Sequential(nn.Conv2d(3, 4, kernel, padding=kernel // 2))
    body.append(nn.BatchNorm2d(4)).append(nn.LeakyReLU(slope))
    body.register_buffer("mean", torch.tensor([numbers]))
    return body


def test_one_net_under_two_names(monkeypatch) -> None:
    made = {"a": net(), "slope": net(slope=0.2), "mean": net(numbers=2.0)}
    x = (torch.randn(1, 3, 8, 8),)
    maker = packages.Package(lambda: (), lambda name: (made[name], x), "torch")
    monkeypatch.setitem(packages.PACKAGES, "mine", maker)
    parameters = sum(p.numel() for p in net().parameters())
    others = {f"mine:{name}": {"ops": [3, 2], "params": parameters} for name in made}
    own = twins.digest(net(), (torch.randn(1, 3, 8, 8),))
    found = twins.same_net("mine", own, parameters, others)
    assert found == {
        "ops": [3, 2],
        "params": parameters,
        "same_as": "mine:a",
        "net": own,
    }
    del others["mine:a"]
    assert twins.same_net("mine", own, parameters, others) is None
    assert twins.digest(net(), (torch.randn(1, 3, 9, 8),)) != own
    assert twins.digest(net(kernel=5), x) != own
    text = page({"mine:a": RECORD, "mine:b": {**RECORD, "same_as": "mine:a"}})
    assert "| nets run under another name | 1 |" in text


def test_time_is_that_of_the_processor() -> None:
    text = page({"timm:a": {**RECORD, "share": 0.5}})
    assert "median 1.5 s over 1 models" in text


def test_a_model_over_the_limit_is_told_from_a_crash(monkeypatch) -> None:
    def spin(*_: object) -> None:
        while True:
            pass

    monkeypatch.setattr(survey, "survey_one", spin)
    monkeypatch.setattr(survey, "SECONDS", 1)
    monkeypatch.setattr(survey, "PATIENCE", 100)  # the machine may have other work
    record = survey._in_process(("timm", "any", False))
    assert record == {"status": "timeout", "note": "over 1 s of processor time"}
    monkeypatch.setattr(survey, "survey_one", lambda *_: os._exit(3))
    record = survey._in_process(("timm", "any", False))
    assert record == {"status": "crash", "note": "exit code 3"}


@pytest.mark.parametrize("end", ["limit", "crash", "error"])
def test_a_verdict_outlives_what_comes_after_it(monkeypatch, end: str) -> None:
    def stages(*_: object) -> Iterator[dict[str, object]]:
        yield {"status": "equal", "ops": [2, 1]}
        if end == "error":
            raise ValueError("a peer")
        while end == "limit":
            pass
        os._exit(3)

    monkeypatch.setattr(survey, "survey_one", stages)
    monkeypatch.setattr(survey, "SECONDS", 1)
    monkeypatch.setattr(survey, "PATIENCE", 100)  # the machine may have other work
    monkeypatch.setattr(survey, "OTHER_DOOR", 1)
    record = survey._in_process(("timm", "any", True))
    assert record["status"] == "equal" and record["ops"] == [2, 1]
    told = {"limit": "over 1 s", "crash": "exit code 3", "error": "ValueError: a peer"}
    assert record["unfinished"].startswith(told[end])


def test_the_smallest_image_that_a_model_takes() -> None:
    class Fixed(nn.Module):
        def __init__(self, img_size: int = 200) -> None:
            super().__init__()
            self.head = nn.Linear(3 * img_size**2, 2)

        def forward(self, x: Tensor) -> Tensor:
            if self.head.in_features % 7:
                raise ValueError("the side is no multiple of seven")
            return self.head(x.flatten(1))

    _, (image,) = packages.smallest(Fixed, (3, 200, 200))
    assert image.shape == (1, 3, 98, 98)
    _, (image,) = packages.smallest(lambda: nn.Conv2d(3, 4, 3), (3, 64, 80))
    assert image.shape == (1, 3, 64, 80)


def test_a_model_that_overflows_is_given_statistics_of_what_it_sees() -> None:
    torch.manual_seed(0)
    steps = [
        step for _ in range(40) for step in (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    ]
    model = randomise(nn.Sequential(*steps))
    with torch.no_grad():
        for step in model[1::2]:
            step.running_var.fill_(1e-4)
        x = torch.randn(2, 4, 6, 6)
        assert not model(x).isfinite().all()
        settle(model, (x,))
        assert model(x).isfinite().all() and not model.training
    assert model[1].momentum == 0.1 and model[1].running_mean.abs().min() > 0


def test_peers_are_tried_strongest_first() -> None:
    left: dict[str, object] = {"timm": 5, "torch": 4, "both": 3}
    rivals = {name: partial(left.__getitem__, name) for name in left}
    assert compared(rivals, every=False) == {"both": 3}
    left["both"] = "wrong (1e-01)"
    assert compared(rivals, every=False) == {"both": left["both"], "torch": 4}
    assert compared(rivals, every=True) == left


def test_what_was_too_large_is_run_once_it_fits() -> None:
    large = {"stamp": "s", "status": "too large", "params": 200e6}
    assert survey.is_current(large, "s", 120e6)
    assert not survey.is_current(large, "s", 300e6)
    assert not survey.is_current(large, "t", 120e6)
    assert not survey.is_current({}, "s", 120e6)


def test_a_peer_with_another_output_is_no_peer() -> None:
    assert best_peer(RECORD) == 3
    assert best_peer({"peers": {"timm": "KeyError"}}) is None


def test_smallest_of_every_family_of_every_package_comes_first(monkeypatch) -> None:
    def package(*names: str) -> packages.Package:
        return packages.Package(lambda: ((n[0], n) for n in names), None, "x")

    table = {"one": package("a_large", "a_tiny", "b_s"), "two": package("c")}
    monkeypatch.setattr(packages, "PACKAGES", table)
    every = [(p, name) for p, _, name in wanted(table, False)]
    assert every == [
        ("one", "a_tiny"),
        ("one", "b_s"),
        ("two", "c"),
        ("one", "a_large"),
    ]
    assert [name for _, _, name in wanted(table, True)] == ["a_tiny", "b_s", "c"]

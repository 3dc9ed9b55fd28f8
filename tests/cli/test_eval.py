"""`fastvit eval`, `fastvit predict` and `fastvit data`."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from PIL import Image
from train_helpers import write_images

import repcompiler as rc

THREE = ("--model-arg", "num_classes=3")


@pytest.fixture
def images(folder) -> str:
    write_images(folder / "data" / "val", each=4)
    return "data"


@pytest.fixture
def evaluate(fastvit, net, images):
    def run(*args, model=net, data=images):
        options = THREE if model == net else ()
        return fastvit("eval", data, "--model", model, *options, *args)

    return run


def test_json_has_the_pinned_keys_and_both_forms(evaluate):
    document = json.loads(evaluate("--fuse", "--json", "-").out)
    pinned = {"top1", "top5", "loss", "images", "images_per_second"}
    assert document.keys() >= pinned | {"fused", "agreement"}
    assert document["fused"].keys() >= pinned
    assert document["agreement"] == 1.0
    assert document["images"] == 12
    assert document["fused"]["loss"] == pytest.approx(document["loss"], rel=1e-5)
    # Three classes: the right one is always among the five most likely.
    assert document["top5"] == 100.0


def test_results_are_written_as_table_and_with_every_image(evaluate, folder):
    result = evaluate("--fuse", "--results", "r.csv", "--results", "r.json")
    assert result.code == 0
    assert "Agree: the same class for all 12 images" in result.out
    rows = list(csv.DictReader((folder / "r.csv").open()))
    whole = json.loads((folder / "r.json").read_text())
    assert [row["form"] for row in rows] == ["model", "fused"]
    assert float(rows[0]["top1"]) == whole["top1"]
    right = [row for row in whole["predictions"] if row["class"] == row["predicted"]]
    assert 100 * len(right) / 12 == pytest.approx(whole["top1"])
    wrong = sum(pair["count"] for pair in whole["confused"])
    assert wrong == 12 - len(right)


def test_a_form_that_says_another_class_fails_the_job(evaluate, monkeypatch):
    real = rc.fuse

    def wrong(model, **options):
        result = real(model, **options)
        with torch.no_grad():
            for parameter in result.model.parameters():
                parameter.neg_()
        return result

    monkeypatch.setattr(rc, "fuse", wrong)
    result = evaluate("--fuse", "--json", "-")
    assert result.code == 1
    assert json.loads(result.out)["agreement"] < 1
    assert "gives another class for" in result.err


def test_a_program_of_one_fixed_batch_takes_any_number_of_images(evaluate, folder):
    from net import build  # written by the fixture; the command imports it as well

    torch.manual_seed(0)
    model = build(num_classes=3).eval()
    example = (torch.zeros(5, 3, 16, 16),)
    torch.export.save(torch.export.export(model, example), "five.pt2")
    torch.save(model.state_dict(), "n.pth")
    fixed = json.loads(evaluate("--json", "-", model="five.pt2").out)
    free = json.loads(evaluate("--json", "-", "--weights", "n.pth").out)
    assert fixed["images"] == free["images"] == 12
    assert fixed["loss"] == pytest.approx(free["loss"], rel=1e-5)


def test_unreadable_images_are_left_out_and_listed(evaluate, folder):
    (folder / "data/val/b/1.png").write_text("no image")
    document = json.loads(evaluate("--json", "-").out)
    assert document["images"] == 11
    assert document["skipped"][0]["image"].endswith("val/b/1.png")
    strict = evaluate("--strict")
    assert strict.code == 2
    assert "1.png cannot be read" in strict.error


def test_classes_must_be_the_models(fastvit, net, images):
    result = fastvit("eval", images, "--model", net)
    assert "data has 3 classes, net.py:build 5" in result.error
    assert result.code == 2


def test_calibration_is_given_on_request_alone(evaluate):
    assert "calibration_error" not in json.loads(evaluate("--json", "-").out)
    found = json.loads(evaluate("--json", "-", "--calibration").out)
    assert 0 <= found["calibration_error"] <= 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--results", "r.txt"), "'.txt' says no format"),
        (("--results", "no/r.csv"), "there is no directory no"),
        (("--results", "r.csv", "--results", "./r.csv"), "r.csv is given twice"),
        (("--json", "/dev/null"), "--json /dev/null is a device or a pipe"),
        (("--workers", "100000"), "--workers"),
        (("--batch", "0"), "--batch"),
    ],
)
def test_bad_options_are_one_line_and_code_2(evaluate, args, said):
    result = evaluate(*args)
    assert result.code == 2
    assert said in result.error


def test_predict_gives_the_likely_classes_of_each_image(fastvit, net, images):
    files = ("data/val/a/0.png", "data/val/b/0.png")
    args = ("predict", net, *files, *THREE, "--top", "2", "--json", "-")
    document = json.loads(fastvit(*args).out)
    assert [row["image"] for row in document["predictions"]] == list(files)
    for row in document["predictions"]:
        first, second = (guess["probability"] for guess in row["top"])
        assert 1 >= first >= second >= 0


def test_predict_agrees_with_the_model_called_by_hand(fastvit, net, images, folder):
    from net import build

    torch.manual_seed(0)
    model = build(num_classes=3).eval()
    torch.save(model.state_dict(), "n.pth")
    Image.new("RGB", (16, 16), (255, 0, 0)).save("red.png")
    args = ("predict", net, "red.png", *THREE, "--weights", "n.pth", "--json", "-")
    found = json.loads(fastvit(*args).out)["predictions"][0]["top"]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    red = [((255, 0, 0)[i] / 255 - mean[i]) / std[i] for i in range(3)]
    pixels = torch.tensor(red).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    expected = model(pixels).softmax(1)[0]
    for guess in found:
        assert guess["probability"] == pytest.approx(
            expected[guess["index"]].item(), rel=1e-5
        )


def test_predict_names_what_it_cannot_read_and_predicts_the_rest(fastvit, net, images):
    args = ("predict", net, "none.png", "data/val/a/0.png", *THREE)
    result = fastvit(*args)
    assert result.code == 2
    assert "none.png cannot be read: No such file" in result.err
    assert "data/val/a/0.png" in result.out


def test_predict_names_every_image_that_it_cannot_read(fastvit, net, images, folder):
    (folder / "empty.png").write_bytes(b"")
    result = fastvit("predict", net, "none.png", "empty.png", "data", *THREE)
    assert result.code == 2
    assert "2 images" not in result.out
    assert "3 images could not be read" in result.out
    for said in ("none.png: No such file", "empty.png: it is empty", "data: Is a dir"):
        assert said in result.out


def test_data_lays_out_real_images_once(fastvit, folder):
    document = json.loads(fastvit("data", "digits", "d", "--json", "-").out)
    assert (document["train"], document["val"], document["classes"]) == (1442, 355, 10)
    assert len(list((folder / "d/train").rglob("*.png"))) == 1442
    assert "not an empty folder" in fastvit("data", "digits", "d").error
    (folder / "file").write_text("")
    beneath = fastvit("data", "digits", "file/x")
    assert (beneath.code, "file/x cannot be made" in beneath.error) == (2, True)
    unknown = fastvit("data", "cats", "c")
    assert (unknown.code, "One of mnist, digits" in unknown.error) == (2, True)

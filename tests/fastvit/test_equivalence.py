"""Same weights, same numbers as timm's model.

Bit for bit: the same operators run in the same order on one thread, so whatever differs
is a difference in the function.
"""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.export import Dim

from fastvit import FastViTBackbone, create_model


@pytest.mark.parametrize("name", ["fastvit_t8", "fastvit_sa12", "fastvit_ma36"])
def test_eval_output_is_timms(name, make_twins, make_image):
    ours, theirs = make_twins(name)
    x = make_image(size=96)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
        features = ours.forward_features(x)
        assert torch.equal(features, theirs.forward_features(x))
        pooled = ours.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, ours.num_features)
    assert torch.equal(pooled, features.mean((2, 3)))


@pytest.mark.parametrize("name", ["fastvit_t12", "fastvit_s12", "fastvit_sa24"])
def test_eval_output_is_timms_at_odd_sizes(name, make_twins, make_image):
    ours, theirs = make_twins(name, num_classes=10, in_chans=1)
    x = make_image(batch=1, size=70, chans=1)[..., :45]
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["fastvit_t8", "fastvit_sa12"])
def test_a_training_step_is_timms(name, make_twins, make_image):
    ours, theirs = make_twins(name)
    labels = torch.tensor([3, 141, 59])
    x = make_image(batch=3)
    outputs, gradients = [], []
    for model in (ours.train(), theirs.train()):
        pixels = x.clone().requires_grad_()
        logits = model(pixels)
        F.cross_entropy(logits, labels).backward()
        outputs.append(logits)
        by_name = {name: p.grad for name, p in model.named_parameters()}
        gradients.append({"input": pixels.grad, **by_name})
    assert torch.equal(*outputs)
    assert differing(*gradients) == []
    assert differing(ours.state_dict(), theirs.state_dict()) == []
    assert all(
        int(value) == 1
        for key, value in ours.state_dict().items()
        if key.endswith("num_batches_tracked")
    )


def test_drop_path_drops_as_timms(make_image):
    torch.manual_seed(0)
    theirs = timm.create_model("fastvit_sa12", drop_path_rate=0.5)
    ours = create_model("fastvit_sa12", drop_path_rate=0.5, layer_scale_init=1.0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "layer_scale" in name:
                parameter.fill_(1.0)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    outputs = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(11)
        with torch.no_grad():
            outputs.append(model(make_image(batch=4)))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", ["fastvit_t8", "fastvit_sa12"])
def test_backbone_gives_timms_four_feature_maps(name, make_random, make_image):
    backbone = make_random(name, features_only=True)
    theirs = timm.create_model(name, features_only=True)
    # timm's feature extractor writes `stages_0` where its classifier has `stages.0`
    flat = {
        key.replace("stages.", "stages_").replace("stem.", "stem_"): value
        for key, value in backbone.state_dict().items()
    }
    theirs.load_state_dict(flat, strict=True)
    x = make_image(size=72)
    with torch.no_grad():
        ours, expected = backbone(x), theirs.eval()(x)
    assert len(ours) == 4
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert list(backbone.channels) == theirs.feature_info.channels()
    assert list(backbone.strides) == theirs.feature_info.reduction()
    for out, channels, stride in zip(
        ours, backbone.channels, backbone.strides, strict=True
    ):
        assert out.shape == (2, channels, -(-72 // stride), -(-72 // stride))


def test_backbone_with_norms_is_timms_dense_prediction_form(make_random, make_image):
    ours = make_random("fastvit_sa12", features_only=True, norms=True)
    theirs = timm.create_model("fastvit_sa12", fork_feat=True)
    assert isinstance(ours, FastViTBackbone)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        pairs = zip(ours(make_image()), theirs.eval()(make_image()), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["fastvit_t8", "fastvit_sa12"])
@pytest.mark.parametrize("features_only", [False, True])
def test_symbolic_trace_computes_the_same_at_any_size(
    name, features_only, make_random, make_image
):
    model = make_random(name, features_only=features_only)
    graph = torch.fx.symbolic_trace(model)
    for size in (64, 72):
        x = make_image(batch=1, size=size)
        with torch.no_grad():
            assert same(graph(x), model(x))


@pytest.mark.parametrize("name", ["fastvit_t8", "fastvit_sa12"])
def test_export_keeps_batch_height_and_width_dynamic(name, make_random, make_image):
    model = make_random(name)
    free = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    program = torch.export.export(model, (make_image(),), dynamic_shapes=(free,))
    for x in (make_image(batch=3), make_image(batch=5, size=97)[..., :70]):
        with torch.no_grad():
            assert same(program.module()(x), model(x))


def test_export_with_fixed_size_and_dynamic_batch(make_random, make_image):
    model = make_random("fastvit_sa12")
    program = torch.export.export(
        model, (make_image(),), dynamic_shapes=({0: Dim("batch")},)
    )
    with torch.no_grad():
        x = make_image(batch=4)
        assert same(program.module()(x), model(x))


def test_models_copy_and_run_in_other_precisions(make_random, make_image):
    model = make_random("fastvit_sa12")
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        exact = double(make_image().double())
        assert exact.dtype == torch.float64
        error = (model(make_image()) - exact).norm() / exact.norm()
    assert error < 1e-4  # float32 rounding, 1e-7 a step, through some 270 ops
    assert model(make_image()).dtype == torch.float32


def same(one, other):
    """Equal tensors, or equal lists of them."""
    ones, others = ([v] if torch.is_tensor(v) else v for v in (one, other))
    return all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


def differing(one, other):
    """Names whose tensors differ in any bit; the two dictionaries share their names."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]

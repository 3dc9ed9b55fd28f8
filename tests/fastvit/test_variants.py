"""The table of variants is the published one, and the options do what they say."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import DropPath

import fastvit
from fastvit import VARIANTS, ConfigError, FastViTConfig, create_model, preprocessing
from fastvit.blocks import LayerScale

# parameters, drop path, layer scale init, evaluation crop: counted on the released
# models, and from the released training recipe
PUBLISHED = {
    "fastvit_t8": (4_026_232, 0.0, 1e-5, 0.9),
    "fastvit_t12": (7_553_704, 0.0, 1e-5, 0.9),
    "fastvit_s12": (9_473_576, 0.0, 1e-5, 0.9),
    "fastvit_sa12": (11_580_968, 0.1, 1e-5, 0.9),
    "fastvit_sa24": (21_554_216, 0.1, 1e-5, 0.9),
    "fastvit_sa36": (31_527_464, 0.2, 1e-6, 0.95),
    "fastvit_ma36": (44_068_004, 0.35, 1e-6, 0.95),
}


def on_meta(name, **options):
    with torch.device("meta"):
        return create_model(name, **options)


def test_the_seven_published_variants_and_no_other():
    assert list(VARIANTS) == list(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_shapes_and_their_order_are_timms(name):
    with torch.device("meta"):
        theirs = timm.create_model(name, pretrained=False)
    ours = on_meta(name)
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]
    # optimizers number parameters by this order
    assert [k for k, _ in ours.named_parameters()] == [
        k for k, _ in theirs.named_parameters()
    ]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name):
    count = sum(parameter.numel() for parameter in on_meta(name).parameters())
    assert count == PUBLISHED[name][0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_drop_path_rises_from_0_to_the_variants_rate(name):
    rate = PUBLISHED[name][1]
    model = on_meta(name)
    depth = sum(model.config.layers)
    blocks = [block for stage in model.stages for block in stage.blocks]
    for index, block in enumerate(blocks):
        expected = rate * index / (depth - 1)
        drops = [getattr(block, n, None) for n in ("drop_path", "drop_path1")]
        drop = next(module for module in drops if module is not None)
        got = drop.drop_prob if isinstance(drop, DropPath) else 0.0
        assert got == pytest.approx(expected, abs=1e-6)  # the ramp is in float32
    both = [b for b in blocks if hasattr(b, "drop_path1")]
    assert all(b.drop_path1.extra_repr() == b.drop_path2.extra_repr() for b in both)


@pytest.mark.parametrize("name", ["fastvit_sa12", "fastvit_sa36"])
def test_every_layer_scale_starts_at_the_variants_value(name):
    init = PUBLISHED[name][2]
    model = create_model(name)
    scales = [m for m in model.modules() if isinstance(m, LayerScale)]
    assert len(scales) == 2 * sum(model.config.layers)
    assert all(torch.all(m.gamma == init) for m in scales)


@pytest.mark.parametrize("name", PUBLISHED)
def test_layer_scale_init_and_crop_are_the_published_ones(name):
    assert VARIANTS[name].layer_scale_init == PUBLISHED[name][2]
    made_with = preprocessing(name)
    assert made_with == on_meta(name).preprocessing
    assert made_with.crop_pct == PUBLISHED[name][3]
    assert made_with.input_size == (3, 256, 256)
    assert made_with.interpolation == "bicubic"
    assert made_with.mean == (0.485, 0.456, 0.406)
    assert made_with.std == (0.229, 0.224, 0.225)


def test_same_seed_gives_the_same_initial_weights_as_timm():
    torch.manual_seed(3)
    ours = create_model("fastvit_sa12").state_dict()
    torch.manual_seed(3)
    theirs = timm.create_model("fastvit_sa12", pretrained=False).state_dict()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_variant_has_a_factory_of_its_name(name):
    with torch.device("meta"):
        model = getattr(fastvit, name)(num_classes=7)
    assert model.config == on_meta(name, num_classes=7).config


def test_options_reach_the_model():
    model = create_model(
        "fastvit_t8", num_classes=5, in_chans=1, drop_path_rate=0.2, drop_rate=0.3
    )
    assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 5)
    assert model.stages[3].blocks[1].drop_path.drop_prob == pytest.approx(0.2)
    assert model.head.drop.p == 0.3
    assert model.preprocessing.input_size == (1, 256, 256)
    assert len(model.preprocessing.mean) == len(model.preprocessing.std) == 1


def test_a_new_classifier_has_the_new_size_and_leaves_the_rest():
    model = create_model("fastvit_t8")
    before = model.stem[0].conv_kxk[0].conv.weight.clone()
    model.reset_classifier(4)
    assert model.num_classes == model.config.num_classes == 4
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 4)
    assert torch.equal(model.stem[0].conv_kxk[0].conv.weight, before)


def test_no_classes_gives_pooled_features():
    model = on_meta("fastvit_t8", num_classes=0)
    x = torch.zeros(2, 3, 64, 64, device="meta")
    assert model(x).shape == (2, model.num_features) == (2, 768)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"fastvit_t9.*fastvit_t8.*fastvit_ma36"):
        create_model("fastvit_t9")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": (2, 2)}, "layers has 2 entries"),
        ({"layers": (2, 0, 2, 2)}, "at least 1"),
        ({"mlp_ratio": 0}, "above 0"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"in_chans": 0}, "in_chans is 0"),
        ({"drop_path_rate": 1.0}, r"\[0, 1\)"),
        ({"token_mixers": ("pool",) * 4}, "'pool' is unknown"),
        ({"token_mixers": ("attention",) * 4, "dims": (48, 96, 192, 384)}, "48"),
    ],
)
def test_fields_that_make_no_model_are_refused(change, said):
    fields = {"layers": (1, 1, 1, 1), "dims": (32, 32, 32, 32)} | change
    with pytest.raises(ConfigError, match=said):
        FastViTConfig(**fields)


def test_norms_belong_to_the_backbone():
    with pytest.raises(ConfigError, match="features_only"):
        create_model("fastvit_t8", norms=True)


def test_only_the_train_form_exists():
    attributes = {
        name for module in on_meta("fastvit_sa12").modules() for name in dir(module)
    }
    banned = {"reparameterize", "inference_mode", "reparam_conv", "fuse"}
    assert attributes & banned == set()


def test_exports_are_what_the_package_lists():
    assert sorted(fastvit.__all__) == sorted(set(fastvit.__all__))
    assert all(hasattr(fastvit, name) for name in fastvit.__all__)

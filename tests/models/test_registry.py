"""All 26 names: they build, have the published size, run, and every trainable parameter gets a gradient."""

import pytest
import torch

from fourm.models import FM, MODEL_NAMES, FMViT, count_parameters, model_config
from fourm.utils.errors import UserError
from tests.models.toy_models import DECLARATIONS, TARGETS, toy_batch

DOMAINS = [
    "rgb@224",
    "tok_rgb@224",
    "tok_depth@224",
    "tok_semseg@224",
    "tok_normal@224",
    "tok_clip@224",
    "caption",
    "det",
]
FULL = [name for name in MODEL_NAMES if "vit" not in name]
VITS = [name for name in MODEL_NAMES if "vit" in name]
PUBLISHED = {"base": 198e6, "large": 705e6, "xlarge": 2.8e9}


def test_there_are_thirteen_models_and_thirteen_vits():
    assert (len(FULL), len(VITS)) == (13, 13)
    assert {"fm_tiny_6e_6d_gelu", "fm_xlarge_24e_24d_swiglu_qknorm_nobias", "fm_vit_small_8e_swiglu_nobias"} <= {
        *MODEL_NAMES
    }
    assert "fm_tiny_6e_6d_swiglu_qknorm_nobias" not in MODEL_NAMES


@pytest.mark.parametrize("name", FULL)
def test_trunks_have_the_published_size(name):
    with torch.device("meta"):
        model = FM(model_config(name, DOMAINS, DOMAINS[1:]))
    trunk = count_parameters(model)["trunk"]
    expected = PUBLISHED.get(name.split("_")[1])
    if expected:
        assert trunk == pytest.approx(expected, rel=0.02)
    has_bias = any(n.endswith("qkv.bias") for n, _ in model.named_parameters())
    assert has_bias == name.endswith("gelu")
    assert hasattr(model.encoder[0].mlp, "fc3") == ("swiglu" in name)
    assert (not isinstance(model.encoder[0].attn.q_norm, torch.nn.Identity)) == ("qknorm" in name)


@pytest.mark.parametrize("name", VITS)
def test_vits_have_the_encoder_of_their_model(name):
    size, _, variant = name.removeprefix("fm_vit_").split("_", 2)
    full = next(n for n in FULL if n.startswith(f"fm_{size}_") and n.endswith(f"d_{variant}"))
    with torch.device("meta"):
        vit, model = FMViT(model_config(name)), FM(model_config(full, DOMAINS, DOMAINS[1:]))
    expected = {n: p.shape for n, p in model.state_dict().items() if n in vit.state_dict()}
    assert {n: p.shape for n, p in vit.state_dict().items()} == expected


SMALL = {"dim": 16, "encoder_depth": 1, "num_heads": 2}


@pytest.mark.parametrize("share_embedding", [True, False])
@pytest.mark.parametrize("name", FULL)
def test_every_parameter_gets_a_gradient(name, share_embedding):
    config = model_config(
        name,
        [*DECLARATIONS],
        TARGETS,
        modalities=DECLARATIONS,
        share_embedding=share_embedding,
        decoder_depth=1,
        **SMALL,
    )
    model = FM(config)
    model(toy_batch(model), 12, 12)[0].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("name", VITS)
def test_every_parameter_of_a_vit_gets_a_gradient(name):
    vit = FMViT(model_config(name, image_size=32, num_register_tokens=2, **SMALL), output_head=torch.nn.Linear(16, 3))
    output = vit(torch.randn(2, 3, 32, 32))
    assert output.shape == (2, 4, 3)
    output.sum().backward()
    assert [n for n, p in vit.named_parameters() if p.grad is None] == []


def test_mistakes_name_the_nearest_key():
    with pytest.raises(UserError, match="did you mean 'fm_base_12e_12d_gelu'"):
        model_config("fm_base_12e_12d_gelus", [], [])
    with pytest.raises(UserError, match="did you mean 'num_register_tokens'"):
        model_config("fm_base_12e_12d_gelu", [], [], num_register_token=1)
    config = model_config("fm_tiny_6e_6d_gelu", DOMAINS, DOMAINS[1:])
    with pytest.raises(UserError, match="did you mean 'patch_size'"):
        FM(config | {"patchsize": 8})
    with pytest.raises(UserError, match="rgb@224 cannot be a target"):
        FM(config | {"domains_out": DOMAINS})
    with pytest.raises(UserError, match="act_layer 'GELUs' .*did you mean 'GELU'"):
        FM(config | {"act_layer": "GELUs"})
    with pytest.raises(UserError, match="embedding_options: unknown key 'sincos'"):
        FM(config | {"modalities": {"caption": {"embedding_options": {"sincos": False, "max_length": 5}}}})
    with pytest.raises(UserError, match="'domains_out' is required"):
        FM({"domains_in": DOMAINS})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": "abc"}, "'dim' must be a whole number, not 'abc'"),
        ({"dim": 10**12}, "'dim' must be at least 1 and at most 65536, not 1000000000000"),
        ({"num_heads": 0}, "'num_heads' must be at least 1"),
        ({"encoder_depth": 10**9}, "'encoder_depth' must be at least 1 and at most 1000"),
        ({"dim": 100, "num_heads": 7}, "dim 100 is not a multiple of num_heads 7"),
        ({"mlp_ratio": -1}, "'mlp_ratio' must be above 0"),
        ({"mlp_ratio": 1e-6}, "mlp_ratio 1e-06 leaves no hidden units"),
        ({"act_layer": "nonsense"}, "act_layer 'nonsense' is not in torch.nn"),
        ({"act_layer": "Linear"}, "act_layer 'Linear' is not an activation"),
        ({"qkv_bias": "yes"}, "'qkv_bias' must be true or false, not 'yes'"),
        ({"drop_path_rate_encoder": 1.5}, "'drop_path_rate_encoder' must be at least 0 and below 1"),
        ({"image_size": [224]}, "'image_size' must be a whole number"),
        ({"dim": 65536, "num_heads": 64, "encoder_depth": 1000}, "parameters are more than any model has"),
        ({"modalities": 3}, "'modalities' must be a mapping"),
        ({"modalities": {"caption": 3}}, "caption must be a mapping, not 3"),
        (
            {"modalities": {"caption": {"embedding_options": {"max_length": "x"}}}},
            "'max_length' must be a whole number",
        ),
    ],
)
def test_sizes_and_types_that_make_no_model_are_one_sentence(options, message):
    with torch.device("meta"), pytest.raises(UserError, match=message):
        FM(model_config("fm_tiny_6e_6d_gelu", DOMAINS, DOMAINS[1:], **options))


def test_a_model_that_the_machine_cannot_hold_is_not_begun():
    config = model_config("fm_tiny_6e_6d_gelu", ["caption"], ["caption"], dim=32768, num_heads=64, encoder_depth=60)
    with pytest.raises(UserError, match="parameters take .* GB, but this machine has"):
        FM(config)

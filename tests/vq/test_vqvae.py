"""The published learned tokenizers: names, numbers, inputs of every kind."""

import pytest
import torch
from torch.nn import functional as F

from fourm.utils.errors import DataError, UserError
from fourm.vq.quantizers import FSQ, Part
from fourm.vq.vqvae import VQ, VQVAE
from tests.vq.golden import assert_probed, fill, image

TOY = {
    "enc_type": "vit/B_2-Wi_32-H_4", "dec_type": "vit/B_1-Wi_32-H_2", "image_size": 32, "patch_size": 8, "codebook_size": 50,
    "latent_dim": 8, "post_mlp": True,
}  # fmt: skip
FEATURES = {"patch_proj": False, "n_channels": 12, "image_size": 64, "patch_size": 16}
VECTORS = {
    "enc_type": "BottleneckMLP/B_2-Wi_32", "dec_type": "BottleneckMLP/B_1-Wi_16-E_2", "quant_type": "memcodes",
    "num_codebooks": 4, "n_channels": 10,
}  # fmt: skip


def toy(cls=VQVAE, **options):
    torch.manual_seed(0)
    return cls(**TOY | options).eval()


# Numbers of the published code (2 models of full depth, weights by their names)

IDS_64 = [
    [[96, 143, 52, 27], [7, 232, 108, 19], [34, 17, 65, 163], [108, 33, 154, 151]],
    [[133, 94, 59, 250], [143, 81, 244, 76], [68, 81, 209, 62], [108, 205, 205, 207]],
]
IDS_96 = [
    [[126, 246, 216, 67, 93, 179], [68, 249, 217, 55, 121, 207], [249, 33, 48, 55, 142, 76], [18, 178, 174, 252, 9, 152],
     [249, 155, 252, 2, 222, 20], [62, 207, 131, 33, 8, 215]],
]  # fmt: skip
POSITIONS = (0.522833, 0.535117, [0.456693, 0.923987, 0.980067, 0.972014, 0.132957, -0.286285, 1.0, 0.812649, 0.0, 0.0, 0.99748, 0.999747])  # fmt: skip
QUANT_64 = (0.0295032, 0.394482, [0.271387, 0.307075, -0.511933, 0.355911, -0.501131, -0.35194, 0.194793, 1.21216, 0.0784507, 0.0502608, -0.182551, 0.172522])  # fmt: skip
QUANT_96 = (0.00619183, 0.394026, [0.901332, -0.46485, -0.749746, -0.711456, 0.396366, -0.16525, 0.216732, -0.335478, 0.248692, 0.412416, -0.818513, -0.66325])  # fmt: skip
DECODED_64 = (0.0343599, 0.663641, [-0.112461, 0.117208, 0.4456, 0.105959, 0.307899, 0.369689, -1.04864, 0.0859279, -1.06853, -1.78732, 1.68691, -0.242601])  # fmt: skip
DECODED_96 = (0.025024, 0.665426, [0.976597, 0.799367, -0.249273, -0.3972, 0.967942, 0.876578, 0.646053, -0.169951, 0.247107, -0.561926, -0.449438, 0.0436213])  # fmt: skip


@pytest.fixture(scope="module")
def published():
    return fill(
        VQVAE(
            enc_type="vit_s_enc", dec_type="vit_s_dec", image_size=64, codebook_size=256, latent_dim=32, post_mlp=True,
            sync_codebook=False,
        )
    )  # fmt: skip


def linear(name, out, width):
    return {f"{name}.weight": [out, width], f"{name}.bias": [out]}


def norm(name, width):
    return {f"{name}.weight": [width], f"{name}.bias": [width]}


def vit_weights(root, width, depth):
    found = {f"{root}.pos_emb": [1, width, 4, 4]}
    for index in range(depth):
        block = f"{root}.blocks.{index}"
        found |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
        found |= linear(f"{block}.attn.qkv", 3 * width, width) | linear(f"{block}.attn.proj", width, width)
        found |= linear(f"{block}.mlp.fc1", 4 * width, width) | linear(f"{block}.mlp.fc2", width, 4 * width)
    found |= norm(f"{root}.norm_mlp", width)
    return found | linear(f"{root}.post_mlp.fc1", 4 * width, width) | linear(f"{root}.post_mlp.fc2", width, 4 * width)


def test_names_and_shapes_of_weights_are_the_published_ones(published):
    expected = vit_weights("encoder", 512, 8) | vit_weights("decoder", 512, 8) | {
        "encoder.proj.weight": [512, 3, 16, 16], "encoder.proj.bias": [512],
        "quant_proj.weight": [32, 512, 1, 1], "quant_proj.bias": [32],
        "quantize._codebook.initted": [1], "quantize._codebook.cluster_size": [256], "quantize._codebook.embed": [256, 32],
        "decoder.out_proj.weight": [768, 512], "decoder.out_proj.bias": [768],
        "post_quant_proj.weight": [512, 32, 1, 1], "post_quant_proj.bias": [512],
    }  # fmt: skip
    found = {name: list(tensor.shape) for name, tensor in published.state_dict().items()}
    assert found == expected
    roots = list(dict.fromkeys(name.partition(".")[0] for name in found))
    assert roots == ["encoder", "quant_proj", "quantize", "decoder", "post_quant_proj"]


def test_positions_count_rows_first(published):
    for side in (published.encoder, published.decoder):
        assert_probed(side.pos_emb, *POSITIONS)
        assert torch.equal(side.pos_emb[0, :256, 2], side.pos_emb[0, :256, 2, :1].expand(-1, 4))


@pytest.mark.parametrize(
    ("pixels", "ids", "quant", "decoded"),
    [
        (image(101, 2, 3, 64, 64), IDS_64, QUANT_64, DECODED_64),
        (image(132, 1, 3, 96, 96), IDS_96, QUANT_96, DECODED_96),  # positions are resized
    ],
    ids=["64", "96"],
)
@torch.no_grad()
def test_ids_latents_and_pictures_are_those_of_the_published_code(published, pixels, ids, quant, decoded):
    latents, loss, tokens = published.encode(pixels)
    assert tokens.tolist() == ids and tokens.dtype == torch.int64 and loss.tolist() == [0]
    assert torch.equal(published.tokenize(pixels), tokens)
    assert_probed(latents, *quant)
    assert torch.equal(published.tokens_to_embedding(tokens), latents)
    assert_probed(published.decode_tokens(tokens), *decoded)
    torch.testing.assert_close(published.autoencode(pixels), published.decode_quant(latents))
    reconstruction, loss = published(pixels)
    torch.testing.assert_close(reconstruction, published.decode_quant(latents))


VIT = {"enc_type": "vit_b_enc", "dec_type": "vit_b_dec", "post_mlp": True, "image_size": 448}
GLOBAL = {
    "enc_type": "BottleneckMLP/B_6-Wi_1024", "dec_type": "BottleneckMLP/B_6-Wi_1024", "quant_type": "memcodes",
    "latent_dim": 1024,
}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "entries", "millions"),
    [
        (VIT | {"n_channels": 64, "n_labels": 134, "codebook_size": 4096}, 314, 220),
        (VIT | {"n_channels": 512, "patch_proj": False, "codebook_size": 8192}, 313, 182),
        (VIT | {"n_channels": 1, "image_size": 64, "out_conv": True, "codebook_size": 1024, "latent_dim": 1024}, 331, 183),
        (GLOBAL | {"n_channels": 1280, "codebook_size": 8192, "num_codebooks": 16}, 87, 116),
        (GLOBAL | {"n_channels": 207, "codebook_size": 1024, "num_codebooks": 8}, 87, 107),
    ],
    ids=["semseg", "CLIP", "SAM", "global", "poses"],
)  # fmt: skip
def test_the_published_tokenizers_have_their_sizes(options, entries, millions):
    with torch.device("meta"):
        weights = VQVAE(**options).state_dict()
    assert len(weights) == entries
    assert sum(tensor.numel() for tensor in weights.values()) / 1e6 == pytest.approx(millions, abs=0.6)


# Inputs of every kind


def test_maps_of_classes_become_vectors_and_come_back_as_logits():
    model = toy(n_labels=7, n_channels=5)
    ids = torch.randint(7, (2, 32, 32), generator=torch.Generator().manual_seed(0))
    tokens = model.tokenize(ids)
    assert tokens.shape == (2, 4, 4)
    assert torch.equal(model.tokenize(ids[:, None].float()), tokens)  # as transforms give them
    vectors = model.cls_emb.weight[ids].permute(0, 3, 1, 2)
    torch.testing.assert_close(model.prepare_input(ids), vectors)
    assert model.decode_tokens(tokens).shape == (2, 7, 32, 32)
    assert (model.num_channels, model.n_channels) == (1, 5)
    with pytest.raises(DataError, match="below n_labels = 7, not 0 to 7"):
        model.tokenize(ids.masked_fill(ids == 6, 7))
    colours = model.to_rgb(model.decode_tokens(tokens))
    assert colours.shape == (2, 3, 32, 32) and (colours.min(), colours.max()) == (0, 1)
    assert torch.equal(colours, toy(n_labels=7, n_channels=5).to_rgb(model.decode_tokens(tokens)))


def test_maps_of_features_have_a_token_at_each_place():
    model = toy(**FEATURES)
    features = torch.randn(2, 12, 4, 6)
    tokens = model.tokenize(features)
    assert tokens.shape == (2, 4, 6) and model.decode_tokens(tokens).shape == features.shape
    assert model.encoder.pos_emb.shape[2:] == (4, 4) and model.patch_size == 16


def test_vectors_have_several_ids():
    model = toy(**VECTORS)
    x = torch.randn(3, 10, 1, 1)
    tokens = model.tokenize(x)
    assert tokens.shape == (3, 4, 1, 1) and model.decode_tokens(tokens).shape == x.shape
    inner = model.encoder
    y = inner.linear_in(x[:, :, 0, 0])
    for block, scale in zip(inner.blocks, inner.layernorms, strict=True):
        hidden = F.gelu(block.block[0](F.layer_norm(y, (32,), scale.weight, scale.bias, 1e-5)))
        y = y + block.block[2](hidden)
    torch.testing.assert_close(inner(x)[:, :, 0, 0], inner.linear_out(y))


def test_standardised_colours_can_be_taken_back():
    plain, undoing = toy(), toy(undo_std=True)
    colours = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    standardised = ((colours + 1) / 2 - mean) / std
    torch.testing.assert_close(undoing.prepare_input(standardised), colours)
    assert torch.equal(undoing.tokenize(standardised), plain.tokenize(colours))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 32, 30)])
def test_images_of_another_shape_are_an_error(shape):
    with pytest.raises(DataError, match=r"takes images of shape \(B, 3, H, W\) with H and W multiples of 8"):
        toy().tokenize(torch.zeros(shape))


def test_the_last_convolutions_start_as_nothing_and_keep_the_size():
    with_conv, without = toy(out_conv=True), toy()
    without.load_state_dict({n: t for n, t in with_conv.state_dict().items() if "out_conv" not in n})
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(with_conv.autoencode(x), without.autoencode(x), atol=1e-4, rtol=0)
    torch.nn.init.ones_(with_conv.decoder.out_conv[1].gamma)
    block, y = with_conv.decoder.out_conv[1], torch.randn(1, 3, 9, 9)
    z = F.conv2d(y, block.dwconv.weight, block.dwconv.bias, padding=3, groups=3)
    z = (z - z.mean(1, keepdim=True)) / (z.var(1, correction=0, keepdim=True) + 1e-6).sqrt()  # over channels
    hidden = F.gelu(torch.einsum("oc,bchw->bohw", block.pwconv1.weight, z))
    torch.testing.assert_close(block(y), y + torch.einsum("oc,bchw->bohw", block.pwconv2.weight, hidden))


def test_the_last_mlp_of_the_encoder_is_computed_in_float32():
    model, tokens = toy(), torch.randn(1, 16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encoder.finish(tokens), model.encoder.finish(tokens.double()).float())
        assert not torch.equal(model.decoder.finish(tokens), model.encoder.finish(tokens))
        assert model.autoencode(torch.rand(1, 3, 32, 32)).dtype == torch.bfloat16


# Training


def test_training_gives_the_loss_of_the_codes_and_their_statistics():
    model = toy(threshold_ema_dead_code=0).train()
    x = torch.rand(4, 3, 32, 32)
    reconstruction, loss, statistics = model(x, return_statistics=True)
    assert reconstruction.shape == x.shape and loss.shape == (1,) and loss > 0
    assert statistics["counts"].sum() == 64
    before = model.quantize._codebook.embed.clone()
    (F.mse_loss(reconstruction, x) + loss.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert torch.equal(model.quantize._codebook.embed, before)  # not before all processes have been summed up
    model.quantize.update(statistics, torch.zeros(()))
    assert not torch.equal(model.quantize._codebook.embed, before)


@pytest.mark.parametrize(
    "options", [{}, {"quant_type": "fsq", "levels": [8, 5, 5]}, VECTORS], ids=["lucid", "fsq", "memcodes"]
)
def test_a_tokenizer_learns(options):
    """The whole of it, in a loop of a few lines."""
    model = (
        toy(post_mlp=False, ema_decay=0.9, threshold_ema_dead_code=0.05).train()
        if not options
        else toy(**options).train()
    )
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(0)
    shape = (1, 1) if "MLP" in model.enc_type else (16, 16)
    colours = torch.randn(6, model.n_channels, 1, 1, generator=generator)
    errors = []
    for _ in range(150):
        x = colours[torch.randint(6, (16,), generator=generator)].expand(-1, -1, *shape)
        half = x.split(8)
        error = torch.zeros(())
        sums: dict[str, torch.Tensor] = {}
        optimizer.zero_grad()
        for index, part in enumerate(half):
            reconstruction, loss, statistics = model(part, Part(index, 2), return_statistics=True)
            step = F.mse_loss(reconstruction, part) / 2
            (step + loss.sum() / 2).backward()
            error += step.detach()
            sums = {name: sums.get(name, 0) + value for name, value in statistics.items()}
        optimizer.step()
        if sums:
            model.quantize.update(sums, torch.zeros(()))
        errors.append(error.item())
    assert sum(errors[-10:]) < 0.15 * sum(errors[:10])


def test_a_frozen_encoder_stays_as_it_is():
    model = toy(freeze_enc=True, n_labels=4).train()
    assert not model.encoder.training and not model.quantize.training and model.decoder.training
    reconstruction, loss, statistics = model(torch.zeros(1, 32, 32), return_statistics=True)
    reconstruction.sum().backward()
    assert loss.tolist() == [0] and not statistics
    trained = {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"decoder", "post_quant_proj"}
    frozen = {name.partition(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"cls_emb", "encoder", "quant_proj"}


@pytest.mark.parametrize(
    "options", [{"n_labels": 3, "out_conv": True}, VECTORS, {"quant_type": "fsq", "levels": [5, 4]}]
)
def test_a_model_of_the_meta_device_is_initialised_as_any_other(options):
    with torch.device("meta"):
        model = VQVAE(**TOY | options)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().fill_(torch.nan)
    torch.manual_seed(0)
    model.init_weights()
    expected = toy(**options)
    torch.manual_seed(0)
    expected.init_weights()
    for (name, tensor), other in zip(model.named_buffers(), expected.buffers(), strict=True):
        assert torch.equal(tensor, other), name
    for (name, tensor), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(tensor, other), name


def test_weights_begin_as_published():
    model = toy(image_size=32, enc_type="vit/B_2-Wi_64-H_4")
    qkv = model.encoder.blocks[0].attn.qkv
    assert qkv.weight.abs().max().item() == pytest.approx((6 / 128) ** 0.5, rel=0.01) and not qkv.bias.any()
    assert model.encoder.proj.weight.abs().max() <= (3 * 8 * 8) ** -0.5  # torch's own
    torch.testing.assert_close(model.quantize._codebook.embed.norm(dim=1), torch.ones(50))


# Options


def test_arguments_are_attributes_and_unknown_ones_are_ignored():
    model = VQ(**TOY, threshold_ema_dead_code=1, some_training_option=3, n_labels=None, num_codebooks=None)
    assert (model.codebook_size, model.latent_dim, model.norm_codes, model.ema_decay) == (50, 8, True, 0.99)
    assert (model.enc_dim, model.image_size_enc, model.quantize.codebook_size) == (32, 32, 50)
    again = VQ(config=model.config, codebook_size=7)  # a configuration stands for all
    assert again.config == model.config and "some_training_option" not in model.config


def test_fsq_has_the_codes_of_its_levels():
    model = toy(quant_type="fsq", levels=[8, 5, 5])
    assert isinstance(model.quantize, FSQ)
    assert (model.codebook_size, model.vocab_size, model.latent_dim, model.config["codebook_size"]) == (
        200,
        200,
        3,
        200,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enc_type": "vit_x_enc"}, r"unknown vision transformer 'vit_x_enc' \(did you mean 'vit_"),
        ({"enc_type": "vit/B_2-Wi_30-H_2"}, "multiple of 4"),
        ({"enc_type": "BottleneckMLP/B_6"}, "is not an MLP such as"),
        ({"image_size": 30}, "input_size 30 is not a multiple of patch_size 8"),
        ({"codebook_size": 0}, "'codebook_size' must be at least 1"),
        ({"quant_type": "fqs"}, "'quant_type' must be one of 'lucid', 'memcodes', 'fsq'"),
        ({"quant_type": "fsq"}, r"'levels' must be numbers of at least 3 .* not \[\]"),
        ({"norm_codes": False}, "'norm_codes' False is not supported"),
        ({"num_codebooks": 2}, "'num_codebooks' 2 is not supported"),
        ({"latent_dim": "wide"}, "'latent_dim' must be a whole number"),
    ],
)
def test_wrong_options_are_an_error(options, message):
    with pytest.raises(UserError, match=message):
        VQVAE(**TOY | options)


def test_the_encoder_half_does_not_decode():
    with pytest.raises(UserError, match="load it as VQVAE, DiVAE or VQControlNet"):
        toy(VQ).decode_tokens(torch.zeros(1, 4, 4, dtype=torch.long))

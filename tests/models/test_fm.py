"""FourM's forward pass: against the plain implementation, its masks, its gradients, its cost, its freezing."""

import copy

import pytest
import torch

from benchmarks.embed_all import embed_all_loss, saved_bytes, synthetic_batch
from fourm.data.modality_info import MODALITY_INFO, Modality
from fourm.models import FM, FourM, count_parameters, model_config
from fourm.models.decoder_embeddings import SequenceDecoderEmbedding
from fourm.models.encoder_embeddings import SequenceEncoderEmbedding
from fourm.models.fm_utils import LayerNorm
from fourm.models.modality_embedding import sincos_table
from fourm.utils.errors import UserError
from tests.models.toy_models import DECLARATIONS, SWIGLU, TARGETS, toy_batch, toy_config, toy_model

VARIANTS = {
    "gelu with biases": {},
    "swiglu without biases": SWIGLU,
    "qk-norm": SWIGLU | {"qk_norm": True},
    "tied logits": {"share_embedding": True},
    "own modality vectors": {"share_modality_embeddings": False},
    "registers": {"num_register_tokens": 3},
    "causal": {"decoder_causal_mask": True},
    "causal over all modalities": {"decoder_causal_mask": True, "decoder_sep_mask": False},
    "compressed mask over all modalities": {"decoder_sep_mask": False},
    "activation checkpointing": {"use_act_checkpoint": True, "num_register_tokens": 1},
}


@pytest.mark.parametrize("loss_type", ["mod", "token"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_and_gradients_equal_the_plain_implementation(variant, loss_type):
    model, twin = toy_model(**VARIANTS[variant]), toy_model(**VARIANTS[variant])
    batch = toy_batch(model)
    batch["text"]["input_mask"][0] = True  # nothing to read in one modality of one sample
    for entry in batch.values():  # and nothing to read at all in another sample
        entry["input_mask"][1] = True
    selection = model.select_tokens(batch, 14, 11, generator=torch.Generator().manual_seed(7))
    order = [TARGETS[i] for i in torch.randperm(len(TARGETS), generator=torch.Generator().manual_seed(7)).tolist()]

    loss, per_modality = model(batch, 14, 11, loss_type, selection=selection)
    expected, expected_per_modality = embed_all_loss(twin, batch, 14, 11, loss_type, order)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(per_modality, {name: expected_per_modality[name] for name in per_modality})

    loss.backward()
    expected.backward()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        reference = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        torch.testing.assert_close(mine.grad, reference, msg=lambda m, name=name: f"{name}: {m}", rtol=1e-4, atol=1e-5)


def test_a_selection_made_beforehand_changes_nothing():
    model = toy_model()
    batch = toy_batch(model)
    torch.manual_seed(5)
    inside, _ = model(batch, 10, 9)
    torch.manual_seed(5)
    outside, _ = model(batch, 10, 9, selection=model.select_tokens(batch, 10, 9))
    assert torch.equal(inside, outside)


def test_dropped_tokens_do_not_matter_and_get_no_gradient():
    model = toy_model()
    batch = toy_batch(model)
    for entry in batch.values():
        if entry["tensor"].is_floating_point():
            entry["tensor"].requires_grad_()
    selection = model.select_tokens(batch, 10, 9)
    loss, _ = model(batch, 10, 9, selection=selection)
    loss.backward()
    kept = selection.encoder.rows()["pixels"]
    used = torch.zeros(3, 16, dtype=torch.bool)
    used[kept.sample, kept.index] = True
    gradient = batch["pixels"]["tensor"].grad.unfold(2, 4, 4).unfold(3, 4, 4).abs().sum((1, 4, 5)).flatten(1)
    assert torch.equal(gradient > 0, used)

    changed = copy.deepcopy({name: {k: v.detach() for k, v in entry.items()} for name, entry in batch.items()})
    for name, entry in changed.items():
        tensor, used = entry["tensor"], torch.zeros(entry["input_mask"].shape, dtype=torch.bool)
        for rows in (selection.encoder.rows()[name], selection.decoder.rows().get(name)):
            if rows is not None:
                used[rows.sample, rows.index] = True
                if DECLARATIONS[name]["type"].startswith("seq"):
                    used[rows.sample, (rows.index + 1).clamp(max=used.shape[1] - 1)] = True
        if name != "pixels":
            tensor[~used] = 1
    assert torch.equal(model(changed, 10, 9, selection=selection)[0], loss)


def test_forward_never_waits_for_the_device():
    """On the meta device every step whose shape or branch depends on data raises."""
    with torch.device("meta"):
        model = FM(toy_config(num_register_tokens=2))
    batch = toy_batch(model)
    selection = model.select_tokens(batch, 10, 9).to("meta")
    on_device = {name: {key: t.to("meta") for key, t in entry.items()} for name, entry in batch.items()}
    loss, _ = model(on_device, 10, 9, selection=selection)
    loss.backward()
    assert loss.shape == ()


def test_memory_does_not_grow_with_dropped_tokens():
    torch.manual_seed(0)
    names = ["tok_rgb@224", "caption", "tok_rgb@448", "tok_depth@448", "rgb@448", "det"]
    sizes = {"dim": 32, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2}
    model = FM(model_config("fm_tiny_6e_6d_gelu", names, [n for n in names if n != "rgb@448"], **sizes))
    few = synthetic_batch({name: MODALITY_INFO[name] for name in names[:2]}, 4, 8, 8)
    many = synthetic_batch({name: MODALITY_INFO[name] for name in names}, 4, 8, 8)
    for name in names[2:]:
        many[name]["input_mask"][:] = many[name]["target_mask"][:] = True
    few_bytes, many_bytes = (saved_bytes(lambda b=batch: model(b, 16, 16)[0], model) for batch in (few, many))
    assert abs(many_bytes - few_bytes) < 0.001 * few_bytes
    assert saved_bytes(lambda: embed_all_loss(model, many, 16, 16)[0], model) > 1.5 * few_bytes


@pytest.mark.parametrize("options", [{}, SWIGLU], ids=["gelu", "swiglu"])
def test_the_backward_pass_of_an_mlp_keeps_what_enters_its_activation_and_nothing_after(options):
    mlp = toy_model(**options).encoder[0].mlp
    x = torch.randn(50, 32, requires_grad=True)
    hidden, gated = mlp.fc1.out_features, "gated_mlp" in options
    assert saved_bytes(lambda: mlp(x).sum(), mlp) == 4 * 50 * (32 + hidden * (1 + gated))
    mlp(x).sum().backward()
    gradients = [x.grad, *(parameter.grad for parameter in mlp.parameters())]
    plain = mlp.fc2(mlp.act(mlp.fc1(x)) * mlp.fc3(x) if gated else mlp.act(mlp.fc1(x))).sum()
    expected = torch.autograd.grad(plain, [x, *mlp.parameters()])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(gradients, expected, strict=True))


def test_activation_checkpointing_saves_memory():
    batch = toy_batch(toy_model())
    models = [toy_model(use_act_checkpoint=every, encoder_depth=6) for every in (False, 2, True)]
    none, second, all_ = (saved_bytes(lambda model=model: model(batch, 16, 16)[0], model) for model in models)
    assert all_ < 0.7 * none and 0.4 * (none - all_) < none - second < 0.6 * (none - all_)


def test_modalities_that_the_batch_lacks_keep_their_gradients():
    """DDP waits for every parameter's gradient."""
    model = toy_model(share_modality_embeddings=False, num_register_tokens=1)
    batch = {name: entry for name, entry in toy_batch(model).items() if name in ("pixels", "text")}
    loss, per_modality = model(batch, 10, 9)
    loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert set(per_modality) == set(TARGETS)
    assert per_modality["grid"] == 0
    torch.testing.assert_close(loss, per_modality["text"])


def without_targets(entry):
    return entry | {"target_mask": torch.ones_like(entry["target_mask"])}


@pytest.mark.parametrize(
    "named, with_targets",
    [(TARGETS, TARGETS), (TARGETS, ["text"]), (["grid", "text"], ["text"]), (["text"], ["text"]), (["pixels"], [])],
)
@pytest.mark.parametrize("loss_type", ["mod", "token"])
def test_the_loss_is_the_mean_over_the_target_modalities_that_the_batch_names(loss_type, named, with_targets):
    model = toy_model()
    batch = {name: entry for name, entry in toy_batch(model).items() if name in named}
    batch = {name: entry if name in with_targets else without_targets(entry) for name, entry in batch.items()}
    selection = model.select_tokens(batch, 16, 16)
    loss, each = model(batch, 16, 16, loss_type, selection=selection)
    expected = {
        "mod": sum(each[name].item() for name in with_targets) / max(len({*named} & {*TARGETS}), 1),
        "token": sum(each[name].item() * count for name, count in selection.decoder.counts.items())
        / max(sum(selection.decoder.counts.values()), 1),
    }
    assert loss.item() == pytest.approx(expected[loss_type], rel=1e-6)
    assert all(each[name] == 0 for name in TARGETS if name not in with_targets)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters()), "DDP waits for every gradient"


def test_sequence_only_targets_keep_the_mask_token_in_the_graph():
    model = toy_model(domains_out=["text"])
    model(toy_batch(model), 10, 9)[0].backward()
    assert model.mask_token.grad is not None


def test_twenty_one_modalities_run_forward_and_backward():
    names = [name for name, m in MODALITY_INFO.items() if m.max_tokens and m.encoder_embedding and "448" not in name]
    names.remove("sam_mask")
    targets = [name for name in names if MODALITY_INFO[name].decoder_embedding]
    assert (len(names), len(targets)) == (19, 17)
    sizes = {"dim": 32, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2}
    model = FM(model_config("fm_tiny_6e_6d_swiglu_nobias", names, targets, share_embedding=True, **sizes))
    batch = synthetic_batch({name: MODALITY_INFO[name] for name in names}, 2, 2, 3)
    loss, per_modality = model(batch, 64, 64)
    loss.backward()
    assert all(value > 0 for value in per_modality.values())
    assert all(parameter.grad is not None for parameter in model.parameters())
    torch.testing.assert_close(loss, embed_all_loss(model, batch, 64, 64)[0])


def test_autocast_agrees_with_float32():
    model = toy_model(**SWIGLU)
    batch = toy_batch(model)
    selection = model.select_tokens(batch, 10, 9)
    exact, _ = model(batch, 10, 9, selection=selection)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(batch, 10, 9, selection=selection)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.03, atol=0)


def test_a_16_bit_norm_differs_from_a_float32_norm_only_by_rounding():
    torch.manual_seed(0)
    norm = LayerNorm(32, bias=False)
    x = (3 + 5 * torch.randn(100, 32)).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    assert saved_bytes(lambda: norm(x), norm) < 1.2 * x.nbytes, "no copy in float32 is kept"
    direction = torch.randn(100, 32)
    (gradient,) = torch.autograd.grad((y.float() * direction).sum(), x)
    z = norm(x.float())
    (expected,) = torch.autograd.grad((z * direction).sum(), x)
    torch.testing.assert_close(y.float(), z, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=2**-6, atol=0.01)


def test_a_residual_stream_in_bfloat16_trains_like_one_in_float32():
    curves = {}
    batches = [toy_batch(toy_model(), seed=seed) for seed in range(3)]
    for dtype in (torch.float32, torch.bfloat16):
        model = toy_model(**SWIGLU, share_embedding=True, num_register_tokens=1)
        model.residual_dtype = dtype
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        curve = []
        for step in range(30):
            batch = batches[step % 3]
            selection = model.select_tokens(batch, 16, 9, torch.Generator().manual_seed(step), pack=True)
            with torch.autocast("cpu", torch.bfloat16):
                loss, _ = model(batch, 16, 9, selection=selection)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves[dtype] = torch.tensor(curve)
    exact, rounded = curves.values()
    assert not torch.equal(exact, rounded) and exact[-3:].mean() < 0.5 * exact[:3].mean()
    # Autocast with a stream in float32 is itself up to 0.7 % away from a training in float32.
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)


def test_logits_are_those_of_the_kept_targets_only():
    model = toy_model()
    batch = toy_batch(model)
    selection = model.select_tokens(batch, 10, 9)
    logits = model(batch, 10, 9, return_logits=True, selection=selection)
    assert {name: tuple(t.shape) for name, t in logits.items()} == {
        name: (selection.decoder.counts[name], DECLARATIONS[name]["vocab_size"]) for name in TARGETS
    }


@pytest.mark.parametrize("change_at", [0, 1, 2, 3])
def test_causal_decoding_never_looks_ahead(change_at):
    model = toy_model(decoder_causal_mask=True)
    batch = toy_batch(model, size=1)
    selection = model.select_tokens(batch, 20, 20)
    before = model(batch, 20, 20, return_logits=True, selection=selection)["text"]
    batch["text"]["tensor"][0, 3 + change_at] = 7  # targets start after the three inputs
    after = model(batch, 20, 20, return_logits=True, selection=selection)["text"]
    changed = (before != after).any(1).nonzero().flatten().tolist()
    assert changed == list(range(change_at, 4))


@pytest.mark.parametrize(
    ("attention", "visible"),
    [([4, 0, 0, 0], [4, 4, 4, 4]), ([1, 1, 1, 1], [1, 2, 3, 4]), ([2, 0, 1, 1], [2, 2, 3, 4])],
)
def test_compressed_attention_masks(attention, visible):
    model = toy_model(domains_out=["grid"])
    batch = toy_batch(model, size=1)
    chosen = (~batch["grid"]["target_mask"][0]).nonzero().flatten()
    batch["grid"]["decoder_attention_mask"][0, chosen] = torch.tensor(attention, dtype=torch.int32)
    masked = model.target_mask(model.select_tokens(batch, 4, 6).decoder)
    assert (~masked[0, :4]).sum(1).tolist() == visible
    assert masked[0, :, 4:].all()  # nobody sees padding


def test_an_unknown_loss_is_an_error():
    model = toy_model()
    with pytest.raises(UserError, match="'mod' or 'token'"):
        model(toy_batch(model), 4, 4, loss_type="mean")


def test_stochastic_depth_grows_linearly_and_acts_only_in_training():
    options = {"drop_path_rate_encoder": 0.2, "drop_path_rate_decoder": 0.4, "encoder_depth": 3}
    model = toy_model(**options)
    assert [b.drop_path.drop_prob for b in model.encoder] == pytest.approx([0, 0.1, 0.2])
    assert [b.drop_path.drop_prob for b in model.decoder] == pytest.approx([0, 0.4])
    shared = toy_model(**options, shared_drop_path=True)
    assert [b.drop_path.drop_prob for b in shared.encoder] == pytest.approx([0, 0.05, 0.1])
    assert [b.drop_path.drop_prob for b in shared.decoder] == pytest.approx([0.3, 0.4])
    batch = toy_batch(model)
    selection = model.select_tokens(batch, 10, 9)
    assert model(batch, 10, 9, selection=selection)[0] != model(batch, 10, 9, selection=selection)[0]
    model.eval()
    assert model(batch, 10, 9, selection=selection)[0] == model(batch, 10, 9, selection=selection)[0]


def _trainable(model):
    """Top-level parts with trainable parameters; embeddings by modality."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {".".join(n.split(".")[: 2 if "_embeddings." in n else 1]) for n in names}


TRUNK = (
    {"encoder", "encoder_norm", "register_tokens"},
    {"mask_token", "decoder_proj_context", "decoder", "decoder_norm"},
)
EMBEDDINGS = {f"encoder_embeddings.{m}" for m in DECLARATIONS}, {f"decoder_embeddings.{m}" for m in TARGETS}
ALL = set().union(*TRUNK, *EMBEDDINGS)


@pytest.mark.parametrize(
    ("method", "arguments", "frozen"),
    [
        ("freeze_encoder", [], TRUNK[0] | EMBEDDINGS[0]),
        ("freeze_encoder", [False], TRUNK[0]),
        ("freeze_decoder", [], TRUNK[1] | EMBEDDINGS[1]),
        ("freeze_decoder", [False], TRUNK[1]),
        ("freeze_shared_params", [], TRUNK[0] | TRUNK[1]),
        (
            "freeze_encoder_except_specific_embeddings",
            ["text-grid"],
            TRUNK[0] | {"encoder_embeddings.text", "encoder_embeddings.grid"},
        ),
        ("freeze_decoder_except_specific_embeddings", ["text"], TRUNK[1] | {"decoder_embeddings.text"}),
        (
            "freeze_params_except_specific_embeddings",
            ["text-pixels"],
            TRUNK[0] | TRUNK[1] | {"encoder_embeddings.text", "decoder_embeddings.text", "encoder_embeddings.pixels"},
        ),
    ],
)
@pytest.mark.parametrize("unfreeze", ["unfreeze_all", None])
def test_freezing(method, arguments, frozen, unfreeze):
    model = toy_model(num_register_tokens=1, share_modality_embeddings=False)
    getattr(model, method)(*arguments)
    if unfreeze:
        getattr(model, unfreeze)()
    assert _trainable(model) == (ALL if unfreeze else ALL - frozen)


def test_unfreezing_parts():
    model = toy_model(num_register_tokens=1, share_modality_embeddings=False)
    model.requires_grad_(False)
    model.unfreeze_encoder(unfreeze_embeddings=False)
    assert _trainable(model) == TRUNK[0]
    model.unfreeze_shared_params()
    assert _trainable(model) == TRUNK[0] | TRUNK[1]
    model.unfreeze_decoder()
    assert _trainable(model) == ALL - EMBEDDINGS[0]


def test_frozen_embedding_domain_must_exist():
    with pytest.raises(UserError, match="did you mean 'text'"):
        toy_model().freeze_params_except_specific_embeddings("texts")


def test_a_model_from_the_meta_device_is_a_whole_model():
    with torch.device("meta"):
        model = FM(toy_config(share_embedding=True, num_register_tokens=2, **SWIGLU))
    model.to_empty(device="cpu")
    model.init_weights()
    torch.manual_seed(0)
    model.init_weights()
    torch.manual_seed(0)
    direct = FM(toy_config(share_embedding=True, num_register_tokens=2, **SWIGLU))
    direct.init_weights()  # both models have been initialised once before
    torch.manual_seed(0)
    direct.init_weights()
    torch.testing.assert_close(model.state_dict(), direct.state_dict(), rtol=0, atol=0)
    assert count_parameters(model) == count_parameters(direct)  # ties included


@pytest.mark.parametrize("std", [0.02, 0.5])
def test_embedding_vectors_begin_with_init_std(std):
    model = FM(
        toy_config(dim=256, share_embedding=True, num_register_tokens=4, **({} if std == 0.02 else {"init_std": std}))
    )
    vectors = {"mask_token": model.mask_token, "register_tokens": model.register_tokens}
    for name, embedding in model.encoder_embeddings.items():
        vectors[name] = embedding.mod_emb
    vectors["token_emb"] = model.encoder_embeddings["grid"].token_emb.weight
    vectors["learned positions"] = model.encoder_embeddings["global"].pos_emb
    for name, tensor in vectors.items():
        assert tensor.std().item() == pytest.approx(std, rel=0.2), name
    tied = model.decoder_embeddings["grid"].token_emb.weight  # ends as a linear map
    assert tied.abs().max() <= (6 / (40 + 256)) ** 0.5 and model.encoder_embeddings["text"].pos_emb.abs().max() == 1


def test_positions_in_images_have_the_temperature_of_the_model_and_sequences_the_published_one():
    model = FM(toy_config(share_embedding=True, pos_temperature=3.0))
    image, text = (model.encoder_embeddings[name] for name in ("grid", "text"))
    assert torch.equal(image.pos_emb, sincos_table(image.grid, image.pos_emb.shape[-1], 3.0))
    assert torch.equal(text.pos_emb, sincos_table(text.grid, text.pos_emb.shape[-1]))
    assert torch.equal(model.decoder_embeddings["grid"].pos_emb, image.pos_emb)

    def nearest(table):
        unit = table[0] / table[0].norm(dim=1, keepdim=True)
        return (unit @ unit.T - 2 * torch.eye(len(unit))).max()

    assert nearest(image.pos_emb) < nearest(FM(toy_config(share_embedding=True)).encoder_embeddings["grid"].pos_emb)


# SHA-256 of both names is the same modulo 2^15.
COLLIDING = next(
    (first, f"m{i}")
    for seen in [{}]
    for i in range(2000)
    if (first := seen.setdefault(Modality(f"m{i}", "seq").id, f"m{i}")) != f"m{i}"
)


def test_two_modalities_of_one_id_cannot_be_in_one_model():
    text = DECLARATIONS["text"]
    for inputs, targets in ((COLLIDING, COLLIDING[:1]), (COLLIDING[:1], COLLIDING[1:])):
        with pytest.raises(UserError, match=f"{'.* and .*'.join(COLLIDING)} have the same id, [0-9]+, .*another name"):
            toy_model(domains_in=inputs, domains_out=targets, modalities=dict.fromkeys(COLLIDING, text))


@pytest.mark.parametrize(
    "number, message", [(7, "a and b have the same id, 7"), (2**15, "id must be a whole number"), ("7", "not '7'")]
)
def test_ids_of_plain_entries_are_checked_too(number, message):
    info = {"a": {"type": "seq", "id": 7}, "b": {"type": "seq", "id": number}}
    embeddings = {name: SequenceEncoderEmbedding(50, 12) for name in info}
    with pytest.raises(UserError, match=message):
        FourM(
            embeddings,
            {"a": SequenceDecoderEmbedding(50, 12)},
            info,
            dim=32,
            encoder_depth=1,
            decoder_depth=1,
            num_heads=2,
        )


def test_pooled_features_are_the_mean_over_input_tokens_without_registers_and_padding():
    model = toy_model(num_register_tokens=2).eval()
    batch = toy_batch(model, size=2)
    batch["text"]["input_mask"][0] = True  # sample 0 has fewer inputs, so that it is padded
    pooled = model.pooled(batch)
    for index in range(2):
        sample = {
            name: {key: value[index : index + 1] for key, value in entry.items()} for name, entry in batch.items()
        }
        count = sum(int((~sample[name]["input_mask"].bool()).sum()) for name in model.encoder_embeddings)
        x, emb, padding = model.embed_encoder(sample, model.select_tokens(sample, count, 1).encoder)
        assert not padding.any()
        torch.testing.assert_close(pooled[index], model.encode(x + emb, padding)[0, 2:].mean(0))

"""Embedding modules: contents and positions of the selected tokens."""

import math

import pytest
import torch

from fourm.models.decoder_embeddings import ImageTokenDecoderEmbedding, SequenceDecoderEmbedding
from fourm.models.encoder_embeddings import (
    ImageEncoderEmbedding,
    ImageTokenEncoderEmbedding,
    SequenceEmbEncoderEmbedding,
    SequenceEncoderEmbedding,
)
from fourm.models.modality_embedding import Rows, sincos_table
from fourm.utils.errors import DataError, UserError
from tests.models.toy_models import toy_batch, toy_model


def rows(*triples):
    return Rows(*torch.tensor(triples).T)


def test_positions_of_a_line():
    table = sincos_table((6,), 8)[0]
    omega = [10000 ** (-i / 4) for i in range(4)]
    expected = [math.sin(5 * w) for w in omega] + [math.cos(5 * w) for w in omega]
    torch.testing.assert_close(table[5], torch.tensor(expected))


def test_positions_of_a_grid():
    table = sincos_table((3, 3), 8)[0]
    a, b, omega = 7 // 3, 7 % 3, [1, 10000**-0.5]
    expected = [f(p * w) for p in (a, b) for f in (math.sin, math.cos) for w in omega]
    torch.testing.assert_close(table[7], torch.tensor(expected))
    with pytest.raises(UserError, match="multiple of 4"):
        sincos_table((3, 3), 6)


def test_patches_are_ordered_row_column_channel():
    embedding = ImageEncoderEmbedding(num_channels=3, patch_size=2, image_size=6, dim_tokens=12)
    with torch.no_grad():
        embedding.proj.weight.copy_(torch.eye(12))
    image = torch.randn(2, 3, 6, 6)
    x, _ = embedding(image, rows((1, 5, 5)))  # the last patch of the second row
    expected = [image[1, c, 2 + i, 4 + j] for i in range(2) for j in range(2) for c in range(3)]
    torch.testing.assert_close(x[0], torch.stack(expected))
    with pytest.raises(DataError, match=r"\(3, 8, 8\)"):
        embedding(torch.randn(2, 3, 8, 8), rows((0, 0, 0)))


def test_image_tokens_come_flat_or_as_a_grid():
    embedding = ImageTokenEncoderEmbedding(50, patch_size=4, image_size=12, dim_tokens=8)
    ids = torch.randint(50, (2, 9))
    chosen = rows((0, 3, 3), (1, 8, 8))
    x, emb = embedding(ids, chosen)
    torch.testing.assert_close(embedding(ids.view(2, 3, 3), chosen)[0], x)
    torch.testing.assert_close(x[1], embedding.token_emb.weight[ids[1, 8]])
    torch.testing.assert_close(emb[1], embedding.pos_emb[0, 8] + embedding.mod_emb[0, 0])


def test_learned_positions():
    embedding = ImageTokenEncoderEmbedding(50, patch_size=56, image_size=224, sincos_pos_emb=False, dim_tokens=8)
    assert isinstance(embedding.pos_emb, torch.nn.Parameter)
    assert embedding.pos_emb.shape == (1, 16, 8)


def test_padding_of_a_sequence_gets_no_gradient():
    embedding = SequenceEncoderEmbedding(50, max_length=10, dim_tokens=8)
    x, _ = embedding(torch.tensor([[0, 3]]), rows((0, 0, 0), (0, 1, 1)))
    x.sum().backward()
    assert embedding.token_emb.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [3]


def test_a_target_position_beyond_max_length_is_position_0():
    embedding = SequenceDecoderEmbedding(50, max_length=4, dim_tokens=8)
    _, emb = embedding(torch.ones(1, 9, dtype=torch.long), rows((0, 3, 3), (0, 4, 4), (0, 0, 0)), torch.zeros(1, 1, 8))
    assert torch.equal(emb[1], emb[2])
    assert not torch.equal(emb[0], emb[2])


def test_targets_of_sequences_follow_their_tokens_those_of_images_do_not():
    ids, chosen = torch.arange(1, 10)[None], rows((0, 3, 3), (0, 4, 4))
    image = ImageTokenDecoderEmbedding(50, patch_size=4, image_size=12, dim_tokens=8)
    sequence = SequenceDecoderEmbedding(50, max_length=9, dim_tokens=8)
    assert image.targets(ids, chosen).tolist() == [4, 5]
    assert sequence.targets(ids, chosen).tolist() == [5, 6]
    mask_token = torch.randn(1, 1, 8)
    assert torch.equal(image(ids, chosen, mask_token)[0], mask_token[0].expand(2, -1))
    assert torch.equal(sequence(ids, chosen, mask_token)[0], sequence.token_emb.weight[[4, 5]])


@pytest.mark.parametrize("cls", [ImageTokenDecoderEmbedding, SequenceDecoderEmbedding])
def test_sharing_the_embedding_ties_the_logits(cls):
    options = {"max_length": 9} if cls is SequenceDecoderEmbedding else {}
    tied, untied = (cls(50, dim_tokens=8, share_embedding=flag, **options) for flag in (True, False))
    assert tied.to_logits.weight is tied.token_emb.weight
    assert tied.token_emb.weight.abs().max() <= (6 / 58) ** 0.5  # Xavier-uniform, as a (V, D) linear map
    assert not torch.equal(untied.to_logits.weight, untied.token_emb.weight)


def test_vectors_pass_a_linear_map_or_a_bottleneck():
    vectors, chosen = torch.randn(2, 5, 16), rows((1, 2, 0))
    plain = SequenceEmbEncoderEmbedding(max_length=5, orig_emb_dim=16, dim_tokens=8)
    torch.testing.assert_close(plain(vectors, chosen)[0][0], plain.emb_proj(vectors[1, 2]))
    narrow = SequenceEmbEncoderEmbedding(
        max_length=5, orig_emb_dim=16, bottleneck_dim=3, use_bottleneck=True, dim_tokens=8
    )
    assert [tuple(p.shape) for n, p in narrow.named_parameters() if "weight" in n] == [(3, 16), (8, 3)]
    assert narrow(vectors, chosen)[0].shape == (1, 8)


def test_sizes_that_do_not_fit_are_errors():
    with pytest.raises(UserError, match="raise max_sincos_pos_emb"):
        SequenceEncoderEmbedding(50, max_length=600)
    with pytest.raises(UserError, match="not a multiple of patch_size 16"):
        ImageTokenEncoderEmbedding(50, image_size=100)


def test_the_entry_of_a_batch_is_refused_in_a_sentence():
    model = toy_model()
    entry = toy_batch(model)["grid"]
    with pytest.raises(UserError, match="embeds selected tokens, not the whole entry of a batch"):
        model.encoder_embeddings["grid"](entry)
    with pytest.raises(UserError, match="has no forward_embed: targets are embedded by model.embed_decoder"):
        model.decoder_embeddings["grid"].forward_embed(entry)

"""Quantizers against plain references: what a latent becomes, and how a codebook learns."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from vector_quantize_pytorch import FSQ as TheirFSQ

from fourm.utils.errors import UserError
from fourm.vq.quantizers import FSQ, LucidQuantizer, MemcodesQuantizer, Part

GO, SKIP = torch.zeros(()), torch.ones(())
K, L = 20, 6


def lucid(threshold=0.0, codes=K, **options):
    torch.manual_seed(0)
    quantizer = LucidQuantizer(
        codes, L, **{"ema_decay": 0.9, "commitment_weight": 0.5} | options, threshold_ema_dead_code=threshold
    )
    quantizer._codebook.reset_parameters()
    quantizer._codebook.embed.mul_(torch.rand(codes, 1) + 0.5)  # after some training, codes are not of unit length
    quantizer._codebook.cluster_size.uniform_(0, 4)
    return quantizer


def latents(seed=1, batch=4, side=3):
    return torch.randn(batch, L, side, side, generator=torch.Generator().manual_seed(seed))


def rows(z):
    return z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])


def nearest_by_direction(z, codes):
    """One latent after the other."""
    return [
        max(range(len(codes)), key=lambda k: float(row @ codes[k] / np.linalg.norm(codes[k])))
        for row in rows(z).numpy()
    ]


def summed(quantizer, parts):
    """The statistics of a step whose micro-batches are ``parts``."""
    each = [quantizer(z, Part(index, len(parts))).statistics for index, z in enumerate(parts)]
    return {name: sum(statistics[name] for statistics in each) for name in each[0]}


def test_a_latent_becomes_the_code_of_the_nearest_direction_as_it_is():
    quantizer, z = lucid().eval(), latents()
    found = quantizer(z)
    expected = nearest_by_direction(z, quantizer._codebook.embed.numpy())
    assert found.ids.flatten().tolist() == expected and found.ids.shape == (4, 3, 3)
    assert torch.equal(rows(found.latents), quantizer._codebook.embed[expected])
    assert torch.equal(quantizer.embed(found.ids), found.latents)
    assert found.loss.tolist() == [0] and not found.statistics
    assert not torch.allclose(quantizer._codebook.embed.norm(dim=1), torch.ones(K), atol=0.1)


def test_the_gradient_passes_through_and_the_loss_pulls_latents_to_their_codes():
    quantizer, z = lucid(), latents().requires_grad_()
    found = quantizer(z)
    codes = quantizer.embed(found.ids)
    torch.testing.assert_close(found.latents, codes)
    (weight,) = torch.autograd.grad(found.latents.square().sum(), z, retain_graph=True)
    torch.testing.assert_close(weight, 2 * codes)
    assert found.loss.shape == (1,)
    torch.testing.assert_close(found.loss[0], 0.5 * (codes - z).square().mean())
    (pull,) = torch.autograd.grad(found.loss.sum(), z)
    torch.testing.assert_close(pull, (z - codes).detach() / z.numel())


def test_a_training_step_is_that_of_a_plain_loop():
    quantizer, z = lucid(), latents()
    embed, sizes = quantizer._codebook.embed.clone().numpy(), quantizer._codebook.cluster_size.clone().numpy()
    quantizer.update(quantizer(z).statistics, GO)
    chosen = nearest_by_direction(z, embed)
    for k in range(K):
        mine = [row / np.linalg.norm(row) for row, choice in zip(rows(z).numpy(), chosen, strict=True) if choice == k]
        target = np.sum(mine, axis=0) if mine else embed[k]
        expected = 0.9 * embed[k] + 0.1 * target / np.linalg.norm(target)
        np.testing.assert_allclose(quantizer._codebook.embed[k], expected, rtol=1e-5, atol=1e-6)
        assert quantizer._codebook.cluster_size[k].item() == pytest.approx(0.9 * sizes[k] + 0.1 * len(mine), rel=1e-5)
    assert 0 < len(set(chosen)) < K


def test_the_micro_batches_of_a_step_teach_as_one_batch():
    whole, parts = lucid(), lucid()
    z = latents(batch=6)
    whole.update(whole(z).statistics, GO)
    parts.update(summed(parts, z.split([2, 1, 3])), GO)
    for name in ("embed", "cluster_size"):
        torch.testing.assert_close(getattr(parts._codebook, name), getattr(whole._codebook, name))


def test_a_skipped_step_changes_nothing():
    quantizer = lucid(threshold=2.0)
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer.update(quantizer(latents()).statistics, SKIP)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_codes_that_are_not_used_become_latents_of_all_micro_batches():
    quantizer, z = lucid(threshold=2.0), latents(batch=8)
    before = quantizer._codebook.cluster_size.clone()
    statistics = summed(quantizer, z.split(4))
    quantizer.update(statistics, GO)
    sizes = 0.9 * before + 0.1 * statistics["counts"]
    torch.testing.assert_close(quantizer._codebook.cluster_size, sizes)  # not reset
    dead = sizes < 2
    assert 4 < dead.sum() < K
    directions = F.normalize(rows(z), dim=1)
    origins = [
        torch.nonzero((directions - code).abs().amax(1) < 1e-6).flatten().tolist() for code in quantizer._codebook.embed
    ]
    assert [len(found) for found in origins] == dead.int().tolist()
    taken = [found[0] for found in origins if found]
    assert len({*taken}) == len(taken)
    from_first = sum(index < len(directions) // 2 for index in taken)
    assert abs(2 * from_first - len(taken)) <= 1


def test_with_fewer_latents_than_codes_some_are_taken_twice():
    quantizer, z = lucid(threshold=1e9), latents(batch=1, side=2)
    quantizer.update(quantizer(z).statistics, GO)
    assert len(quantizer._codebook.embed.unique(dim=0)) <= 4
    torch.testing.assert_close(quantizer._codebook.embed.norm(dim=1), torch.ones(K))


def test_the_choice_follows_torchs_seed():
    codes = []
    for seed in (5, 5, 6):
        quantizer = lucid(threshold=2.0)
        torch.manual_seed(seed)
        quantizer.update(quantizer(latents()).statistics, GO)
        codes.append(quantizer._codebook.embed)
    assert torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])


def test_the_first_steps_take_a_codebook_to_where_the_latents_are():
    torch.manual_seed(0)
    quantizer = LucidQuantizer(64, L, ema_decay=0.99, commitment_weight=1, threshold_ema_dead_code=256 / 64 / 32)
    quantizer._codebook.reset_parameters()
    used = []
    for step in range(40):
        z = latents(seed=step, batch=16, side=4) * 0.3 + torch.tensor([3.0, 1, 0, 0, 0, 0])[:, None, None]
        found = quantizer(z)
        used.append(len(found.ids.unique()))
        quantizer.update(found.statistics, GO)
    assert used[0] < 20 and used[-1] > 56


@pytest.mark.parametrize("kind", ["lucid", "memcodes", "fsq"])
def test_ids_do_not_depend_on_autocast(kind):
    quantizer = {"lucid": lucid, "memcodes": memcodes, "fsq": lambda: FSQ([5] * L)}[kind]().eval()
    z = latents() * 0.2
    with torch.autocast("cpu", torch.bfloat16):
        found = quantizer(z)
    assert torch.equal(found.ids, quantizer(z).ids)
    assert found.latents.dtype == torch.float32


def memcodes(books=2):
    torch.manual_seed(0)
    quantizer = MemcodesQuantizer(K, L, books)
    for module in quantizer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return quantizer


@pytest.mark.parametrize("books", [1, 3])
def test_memcodes_retrieve_the_value_of_the_best_key(books):
    quantizer, z = memcodes(books).eval(), latents(batch=2)[:, :, :2]
    found = quantizer(z)
    width = L // books
    codes, to_k, to_v = (p.detach().numpy() for p in (quantizer.codes, quantizer.to_k.weight, quantizer.to_v.weight))
    for b, row, column in np.ndindex(2, 2, 3):
        for book in range(books):
            part = slice(book * width, (book + 1) * width)
            scores = codes[book] @ to_k[book] @ z[b, part, row, column].numpy()
            index = found.ids[b, book, row, column] if books > 1 else found.ids[b, row, column]
            assert int(index) == scores.argmax()
            expected = codes[book, index] @ to_v[book]
            np.testing.assert_allclose(found.latents[b, part, row, column].detach(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantizer.embed(found.ids), found.latents)  # on a grid that is not square, too


def test_memcodes_learn_by_gradient():
    quantizer, z = memcodes(), latents().requires_grad_()
    found = quantizer(z)
    assert not found.statistics and found.loss.tolist() == [0]
    torch.testing.assert_close(found.latents, quantizer.embed(found.ids))  # hard in the forward pass
    found.latents.square().sum().backward()
    for tensor in (z, quantizer.codes, quantizer.to_k.weight, quantizer.to_v.weight):
        assert tensor.grad.abs().sum() > 0
    assert not torch.equal(found.ids, quantizer(z).ids)  # the noise
    assert torch.equal(quantizer.eval()(z).ids, quantizer(z).ids)


@pytest.mark.parametrize("levels", [[8, 5, 5, 5], [8, 6, 5], [3, 4], [7, 5, 5, 5, 5]])
def test_fsq_gives_the_codes_of_the_reference(levels):
    ours, theirs = FSQ(levels), TheirFSQ(levels)
    z = (3 * torch.randn(4, len(levels), 8, 9, generator=torch.Generator().manual_seed(0))).requires_grad_()
    found, (codes, ids) = ours(z), theirs(z)
    assert torch.equal(found.ids, ids.long()) and found.ids.dtype == torch.int64
    torch.testing.assert_close(found.latents, codes)
    (mine,) = torch.autograd.grad(found.latents.square().sum(), z)
    (other,) = torch.autograd.grad(codes.square().sum(), z)
    torch.testing.assert_close(mine, other)
    every = torch.arange(ours.codebook_size).view(1, 1, -1)
    torch.testing.assert_close(ours.embed(every), theirs.indices_to_codes(every))
    torch.testing.assert_close(ours.embed(found.ids), found.latents)
    assert FSQ(levels, commitment_weight=0.0)(z).loss.tolist() == [0] and not found.statistics


def test_fsq_is_there_again_after_it_was_made_on_the_meta_device():
    with torch.device("meta"):
        quantizer = FSQ([8, 5])
    assert quantizer.levels.tolist() == [8, 5] and not quantizer.state_dict()
    quantizer.to_empty(device="cpu").levels.zero_()
    quantizer.reset_parameters()
    assert quantizer.levels.tolist() == [8, 5]


@pytest.mark.parametrize("levels", [[], [2, 5], [2**16, 2**16]])
def test_levels_that_make_no_codebook_are_an_error(levels):
    with pytest.raises(UserError, match="'levels' must be"):
        FSQ(levels)


def test_codebooks_that_do_not_share_a_latent_evenly_are_an_error():
    with pytest.raises(UserError, match="'latent_dim' 6 is not a multiple of 'num_codebooks' 4"):
        MemcodesQuantizer(8, 6, 4)


def test_fsq_pulls_latents_that_have_drifted_back_to_where_its_levels_are():
    z = torch.tensor([0.4, 3.5, -1.5, -2.5]).view(1, 2, 1, 2).requires_grad_()
    loss = FSQ([8, 8], commitment_weight=0.5)(z).loss
    assert loss.shape == (1,) and loss.item() == pytest.approx(0.5 * (2.0**2 + 1.0**2) / 4)
    loss.backward()
    assert z.grad.flatten().tolist() == pytest.approx([0, 0.5, 0, -0.25])
    # A code for all images, out of which rounding gives no gradient that leads back.
    z, steps = torch.full((1, 2, 1, 1), 20.0, requires_grad=True), 0
    optimizer = torch.optim.SGD([z], lr=1.0)
    while z.max() > 1.6:
        FSQ([8, 8])(z).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        assert steps < 100

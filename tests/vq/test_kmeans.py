import pytest
import torch

from fourm.vq import kmeans


def _fit(pool, num_codes, epochs=10, seed=0):
    return kmeans.fit(pool, num_codes, epochs=epochs, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def smooth():
    """Vectors with structure on every scale, so that more codes always help."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(6000, 4, generator=generator) @ torch.randn(4, 24, generator=generator)


def test_nearest_is_the_nearest_with_its_distance(monkeypatch):
    monkeypatch.setattr(kmeans, "_SCORES", 64)  # several chunks
    generator = torch.Generator().manual_seed(0)
    vectors, codes = torch.randn(50, 7, generator=generator), torch.randn(11, 7, generator=generator)
    expected = torch.cdist(vectors, codes).min(1)
    ids, distances = kmeans.nearest(vectors, codes)
    assert torch.equal(ids, expected.indices)
    torch.testing.assert_close(distances, expected.values.square())


@pytest.mark.parametrize("seed", range(5))
def test_planted_clusters_are_recovered(seed):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(24, 16, generator=generator) * 5
    sizes = torch.randint(20, 200, (24,), generator=generator)  # of very different frequency
    pool = centres.repeat_interleave(sizes, 0) + 0.1 * torch.randn(int(sizes.sum()), 16, generator=generator)
    codes, report = _fit(pool, 24, seed=seed)
    assert torch.cdist(centres, codes).min(1).values.max() < 0.3
    assert report.used_codes == 24
    assert report.error < 0.001


def test_error_falls_with_vocabulary_and_with_epochs(smooth):
    by_size = [_fit(smooth, size)[1].error for size in (4, 16, 64, 256)]
    assert by_size == sorted(by_size, reverse=True)
    assert by_size[-1] < 0.3 * by_size[0]
    by_epochs = [_fit(smooth, 64, epochs)[1].error for epochs in (1, 3, 12)]
    assert by_epochs == sorted(by_epochs, reverse=True)


def test_report_is_true_of_the_codes(smooth):
    codes, report = _fit(smooth, 32, epochs=3)
    ids, distances = kmeans.nearest(smooth, codes)
    assert report.error == pytest.approx(float(distances.mean() / smooth.var(0, correction=0).sum()), rel=1e-4)
    assert report.used_codes == len(ids.unique())
    share = torch.bincount(ids) / len(ids)
    assert report.perplexity == pytest.approx(float(torch.special.entr(share).sum().exp()), rel=1e-4)


def test_same_generator_same_codes(smooth):
    assert torch.equal(_fit(smooth, 32, seed=1)[0], _fit(smooth, 32, seed=1)[0])
    assert not torch.equal(_fit(smooth, 32, seed=1)[0], _fit(smooth, 32, seed=2)[0])


def test_dead_codes_are_reseeded():
    # The seeds are drawn from a sample in which the second cloud hardly occurs; most of the codes start as repeats.
    generator = torch.Generator().manual_seed(0)
    blank = torch.zeros(40_000, 8)
    rare = torch.randn(300, 8, generator=generator)
    codes, report = _fit(torch.cat([blank, rare]), 100)
    assert report.used_codes >= 95


def test_fewer_different_vectors_than_codes():
    pool = torch.eye(5).repeat(300, 1)
    codes, report = _fit(pool, 16)
    assert report.used_codes == 5
    assert report.error < 1e-6
    assert torch.isfinite(codes).all()

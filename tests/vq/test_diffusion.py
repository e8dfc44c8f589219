"""Noise schedules against the published values, sampling against the formulas written out."""

import sys

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from fourm.utils.errors import MissingDependency, UserError
from fourm.vq.diffusion import NoiseSchedule, conditioning_mask, generators, sample, set_steps

CPU = torch.device("cpu")
ALPHAS = {  # at steps 0, 1, 500, 998, of the published code
    "linear": (0.99989998, 0.99977934, 0.07524620, 4.21e-9),
    "squaredcos_cap_v2": (0.99995875, 0.99991262, 0.49226481, 2.28e-6),
    "shifted_cosine:0.5": (0.99999964, 0.99999940, 0.79949641, 9.89e-6),
}


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("name", ALPHAS)
def test_schedules_are_the_published_ones(name, sampler):
    alphas = NoiseSchedule(sampler, beta_schedule=name).scheduler().alphas_cumprod
    assert alphas[[0, 1, 500, 998]].tolist() == pytest.approx(ALPHAS[name], abs=4e-7, rel=1e-2)
    assert alphas[:2].tolist() == pytest.approx(ALPHAS[name][:2], abs=2e-7)
    assert alphas[999] == 0


def test_without_rescaling_a_little_of_the_picture_is_left():
    schedule = NoiseSchedule(beta_schedule="linear", zero_terminal_snr=False)
    assert schedule.scheduler().alphas_cumprod[-1] == pytest.approx(4.0358e-5, rel=1e-3)


@pytest.mark.parametrize(
    ("steps", "number", "first", "last"), [(50, 50, 999, 19), (4, 4, 999, 249), (30, 31, 999, 9), (1, 1, 999, 999)]
)
def test_sampling_begins_at_the_last_step(steps, number, first, last):
    scheduler = NoiseSchedule().scheduler()
    set_steps(scheduler, steps)
    chosen = scheduler.timesteps.tolist()
    assert (len(chosen), chosen[0], chosen[-1]) == (number, first, last)
    assert {a - b for a, b in zip(chosen, chosen[1:], strict=False)} <= {1000 // steps}


@pytest.mark.parametrize("steps", [0, 1001])
def test_a_number_of_steps_that_cannot_be(steps):
    with pytest.raises(UserError, match=f"from 1 to 1000, not {steps}"):
        set_steps(NoiseSchedule().scheduler(), steps)


def _predict(x: Tensor, t: Tensor) -> Tensor:
    """A stand-in for a network: not linear, other at every step, often outside of [-1, 1]."""
    return torch.sin(2 * x + t[:, None, None, None] / 300) * 1.5


def _clean(alpha: Tensor, x: Tensor, prediction: Tensor, kind: str) -> Tensor:
    signal, noise = alpha.sqrt(), (1 - alpha).sqrt()
    if kind == "epsilon":
        return (x - noise * prediction) / signal
    return prediction if kind == "sample" else signal * x - noise * prediction


@pytest.mark.parametrize("steps", [4, 7])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("linear", "sample"),
        ("linear", "v_prediction"),
        ("linear", "epsilon"),
        ("shifted_cosine:0.5", "sample"),
        ("shifted_cosine:0.5", "v_prediction"),
    ],
)
def test_ddim_follows_its_formulas(name, kind, clip, steps):
    # ε says nothing of a picture of which nothing is left.
    scheduler = NoiseSchedule("ddim", 1000, name, kind, clip, zero_terminal_snr=kind != "epsilon").scheduler()
    set_steps(scheduler, steps)
    got = sample(_predict, (2, 3, 4, 4), scheduler, torch.Generator().manual_seed(3), CPU)

    alphas, width = scheduler.alphas_cumprod, 1000 // steps
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    for t in range(999, -1, -width):
        alpha, after = alphas[t], alphas[t - width] if t >= width else torch.ones(())
        prediction = _predict(x, torch.tensor([t, t]))
        clean = _clean(alpha, x, prediction, kind)
        if kind == "epsilon":
            noise = prediction
        elif kind == "sample":
            noise = (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        else:
            noise = alpha.sqrt() * prediction + (1 - alpha).sqrt() * x
        clean = clean.clamp(-1, 1) if clip else clean
        x = after.sqrt() * clean + (1 - after).sqrt() * noise
    assert torch.allclose(got, x, atol=2e-4, rtol=1e-4)


def test_ddpm_follows_its_formulas():
    scheduler = NoiseSchedule("ddpm", prediction_type="v_prediction").scheduler()
    set_steps(scheduler, 5)
    assert scheduler.timesteps.tolist() == [800, 600, 400, 200, 0]
    got = sample(_predict, (2, 3, 4, 4), scheduler, torch.Generator().manual_seed(3), CPU)

    alphas, g = scheduler.alphas_cumprod, torch.Generator().manual_seed(3)
    x = torch.randn(2, 3, 4, 4, generator=g)
    for t in (800, 600, 400, 200, 0):
        alpha, after = alphas[t], alphas[t - 200] if t else torch.ones(())
        clean = _clean(alpha, x, _predict(x, torch.tensor([t, t])), "v_prediction").clamp(-1, 1)
        ratio = alpha / after
        x = after.sqrt() * (1 - ratio) / (1 - alpha) * clean + ratio.sqrt() * (1 - after) / (1 - alpha) * x
        if t:
            variance = (1 - after) / (1 - alpha) * (1 - ratio)
            x = x + variance.sqrt() * torch.randn(2, 3, 4, 4, generator=g)
    assert torch.allclose(got, x, atol=1e-4)


def test_schedulers_of_others_that_scale_their_input():
    scheduler = EulerDiscreteScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    set_steps(scheduler, 4)
    got = sample(_predict, (2, 3, 4, 4), scheduler, torch.Generator().manual_seed(3), CPU)

    sigmas = scheduler.sigmas.tolist()
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3)) * scheduler.init_noise_sigma
    for t, sigma, after in zip(scheduler.timesteps, sigmas, sigmas[1:], strict=False):
        v = _predict(x / (sigma**2 + 1) ** 0.5, t.expand(2))
        clean = x / (sigma**2 + 1) - v * sigma / (sigma**2 + 1) ** 0.5
        x = x + (x - clean) / sigma * (after - sigma)
    assert torch.allclose(got, x, atol=1e-3)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_picture_depends_on_its_own_seed_alone(sampler):
    def pictures(*seeds: int) -> Tensor:
        scheduler = NoiseSchedule(sampler).scheduler()
        set_steps(scheduler, 5)
        source = generators(seeds, None, len(seeds))
        return sample(_predict, (len(seeds), 3, 4, 4), scheduler, source, CPU)

    together = pictures(8, 5, 6)
    assert torch.equal(together[1:2], pictures(5))
    assert torch.equal(together[[1, 0]], pictures(5, 8))
    assert not torch.equal(together[0], together[1])


def test_one_seed_stands_for_those_that_follow():
    def noise(seed, batch: int) -> list[Tensor]:
        return [torch.randn(3, generator=g) for g in generators(seed, None, batch)]

    assert all(torch.equal(a, b) for a, b in zip(noise(7, 3), noise([7, 8, 9], 3), strict=True))
    with pytest.raises(UserError, match="2 seeds were given for 3 images"):
        generators([1, 2], None, 3)
    with pytest.raises(UserError, match="not both"):
        generators(1, torch.Generator(), 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sampler": "dddpm"}, r"scheduler 'dddpm' is none of ddim, ddpm \(did you mean 'ddpm'\?\)"),
        ({"beta_schedule": "shifted_cosine:none"}, "did you mean 'shifted_cosine:0.5'"),
        ({"beta_schedule": "shifted_cosine:-1"}, "beta_schedule 'shifted_cosine:-1' is none of"),
        ({"prediction_type": "x0"}, "prediction_type 'x0' is none of sample, epsilon, v_prediction"),
    ],
)
def test_names_that_are_unknown(wrong, message):
    with pytest.raises(UserError, match=message):
        NoiseSchedule(**wrong)


def test_the_number_of_masked_tokens():
    torch.manual_seed(0)
    mask = conditioning_mask(1.0, (500, 3, 4), CPU, tokens=(2, 5)).flatten(1)
    assert set(mask.sum(1).tolist()) == {2, 3, 4, 5}
    assert mask.float().mean(0).allclose(torch.full((12,), 3.5 / 12), atol=0.1)  # any of them
    assert conditioning_mask(1.0, (5, 3, 4), CPU).all()
    share = conditioning_mask(0.3, (2000, 1, 2), CPU).float().mean()
    assert share == pytest.approx(0.3, abs=0.05)


def test_what_to_install_if_diffusers_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # importing it fails
    with pytest.raises(MissingDependency, match=r"needs the package diffusers: pip install 'fourm\[diffusion\]'"):
        NoiseSchedule().scheduler()

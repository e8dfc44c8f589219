"""Training, generation and tokenizers do not mix tensors of the host and of a GPU, and compute the same on a GPU."""

import shutil

import pytest
import torch

from fourm.demo.shipped import load_demo
from fourm.models.generate import (
    GenerationSampler,
    build_chained_generation_schedules,
    init_empty_target_modality,
    init_full_input_modality,
)
from fourm.train.tasks.diffusion_tokenizer import DiVAETraining
from fourm.train.tasks.tokenizer import VQVAETraining
from fourm.vq import load_tokenizer
from fourm.vq.save_tokens import SaveTokensOptions, save_tokens
from tests.models.toy_models import SWIGLU, toy_model
from tests.simulated_gpu import GPU, OnGpu, WrongDevice, simulated_gpu
from tests.train.test_tokenizer_task import DIVAE
from tests.train.tokenizer_data import write_config, write_pictures
from tests.train.toy_run import losses, run_in_process, write_run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tests of a real GPU tell more")


def test_what_a_gpu_refuses_is_refused():
    host = torch.ones(3)
    with simulated_gpu():
        layer, x = torch.nn.Linear(3, 2).cuda(), torch.arange(3.0, device="cuda")
        assert layer.weight.device == x.device == GPU and (x + 1).tolist() == [1, 2, 3] and x.sum().item() == 3
        for mix in (
            lambda: x + host,
            lambda: layer(host),
            lambda: torch.stack([x, host]),
            lambda: x.where(host > 0, x),
        ):
            with pytest.raises(WrongDevice):
                mix()
        layer(x).sum().backward()
        assert isinstance(layer.weight.grad, OnGpu) and layer.weight.grad.cpu().tolist() == [[0, 1, 2]] * 2
        assert (x * 2 + host.cuda()).cpu().tolist() == [1, 3, 5] and x[host.long()].tolist() == [1, 1, 1]


def both(run):
    """Run on the CPU and on the simulated GPU."""
    on_cpu = run("cpu")
    with simulated_gpu():
        return on_cpu, run("cuda")


VARIANTS = {
    "bfloat16": {"dtype": "bfloat16", "model_ema": True},
    "muon": {"opt": "muon", "clip_grad": 1.0, "accum_iter": 2, "use_act_checkpoint": True},
    "bfloat16 stream": {"dtype": "bfloat16", "residual_dtype": "bfloat16", "batch_warmup_steps": 4},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_trains_evaluates_saves_and_goes_on(tmp_path, variant):
    def run(device):
        config = write_run(tmp_path / device, num_workers=0, epochs=2, epoch_size=24, **VARIANTS[variant])
        run_in_process(config, "--device", device)
        (config.parent / "out" / "model.safetensors").unlink()
        run_in_process(config, "--device", device)
        run_in_process(config, "--device", device, "--eval")
        return losses(config.parent / "out")

    on_cpu, on_gpu = both(run)
    assert on_cpu == pytest.approx(on_gpu) and len(on_gpu) >= 3


@pytest.mark.parametrize("scheme", ["maskgit", "roar", "halton"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_generation(scheme, dtype):
    def run(device):
        torch.manual_seed(0)
        model = toy_model(**SWIGLU, domains_out=["grid", "text"]).eval().to(device)
        batch = {"pixels": {"tensor": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}}
        batch = init_full_input_modality(batch, model.modality_info, "pixels", device)
        batch = init_empty_target_modality(batch, model.modality_info, "grid", 2, 16, device)
        targets, schemes = (["grid", "text"], [16, 8]), ([scheme, "autoregressive"], [3, None], ["linear", None])
        guided = [1.0, 0.5], ["constant"] * 2, [2.0, 2.0], ["constant"] * 2
        schedule = build_chained_generation_schedules(
            ["pixels"], *targets, *schemes, *guided, modality_info=model.modality_info
        )
        sampler, found = GenerationSampler(model, dtype), []
        for seed in (0, torch.Generator(device).manual_seed(0)):
            result = sampler.generate(batch, schedule, top_p=0.9, top_k=10, seed=seed)
            assert all(entry["tensor"].device == model.mask_token.device for entry in result.values())
            found.append({name: result[name]["tensor"].tolist() for name in ("grid", "text")})
        return found

    on_cpu, on_gpu = both(run)
    assert on_cpu == on_gpu


@pytest.mark.parametrize("task", [VQVAETraining, DiVAETraining])
def test_a_tokenizer_learns_tokenizes_and_decodes(tmp_path, task):
    pictures = write_pictures(tmp_path / "pictures", train=6, val=3)
    keys = DIVAE if task is DiVAETraining else {"batch_size": 2}

    def run(device):
        config = write_config(tmp_path / device, pictures, **keys | {"epochs": 1, "epoch_size": 6})
        run_in_process(config, "--device", device, task=task)
        out = config.parent / "out"
        data = shutil.copytree(pictures / "val", tmp_path / device / "data")
        save_tokens(SaveTokensOptions(tokenizer=str(out), data_root=str(data), device=device, num_workers=0))
        tokenizer = load_tokenizer(out, device)
        ids = tokenizer.tokenize(torch.zeros(1, 3, 32, 32, device=device))
        options = {"timesteps": 2, "seed": 0} if task is DiVAETraining else {}
        picture = tokenizer.decode_pictures(ids, **options)
        assert ids.device.type == device
        return losses(out), picture.shape

    (loss_on_cpu, shape), (loss_on_gpu, shape_of_gpu) = both(run)
    assert loss_on_gpu == pytest.approx(loss_on_cpu, rel=0.05), "which codes are replaced is drawn at random"
    assert loss_on_gpu[1] == pytest.approx(loss_on_cpu[1]) and shape == shape_of_gpu == (1, 3, 32, 32)


def test_the_packaged_model_generates_and_decodes_pictures_and_reads_them():
    with simulated_gpu():
        sampler = load_demo(device="cuda")
        (result,) = sampler("a red car on gravel", ["depth", "rgb", "det"], seed=0)
        (again,) = sampler({"rgb": result["tok_rgb@64"].value}, ["normal"], seed=0)
    assert sampler.generation.model.mask_token.device == GPU
    assert result["tok_depth@64"].value.shape == (64, 64) and again["tok_normal@64"].value.shape == (64, 64, 3)

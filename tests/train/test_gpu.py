"""Training, evaluation, checkpoints and generation on a GPU; skipped without one."""

import math

import pytest
import torch
import torch.distributed as dist

from fourm.models.generate import (
    GenerationSampler,
    build_chained_generation_schedules,
    init_empty_target_modality,
    init_full_input_modality,
)
from fourm.train.fsdp import FSDP
from fourm.train.parallel import DDP
from fourm.train.run import main
from fourm.train.tasks.pretrain import Pretrain
from tests.models.toy_models import SWIGLU, toy_batch, toy_model
from tests.train.toy_run import kill, log_lines, losses, run_in_process, start_ranks, wait_for_step, write_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(
    "options",
    [
        ["--dtype", "bfloat16"],
        ["--dtype", "float16"],
        ["--dtype", "bfloat16", "--compile"],
        ["--dtype", "bfloat16", "--residual_dtype", "bfloat16"],
        ["--model_ema"],
        ["--dtype", "bfloat16", "--use_act_checkpoint", "--accum_iter", "2"],
    ],
    ids=" ".join,
)
def test_a_run_trains_evaluates_and_saves(tmp_path, options):
    config = write_run(tmp_path / "toys")
    run_in_process(config, "--device", "cuda", *options)
    assert all(map(math.isfinite, losses(tmp_path / "toys" / "out").values()))
    assert any("eval" in line for line in log_lines(tmp_path / "toys" / "out"))


def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(tmp_path):
    whole, halves = write_run(tmp_path / "whole"), write_run(tmp_path / "halves")
    run_in_process(whole, "--device", "cuda")
    ranks = start_ranks(halves, "--device", "cuda", strategy=DDP, processes=1)
    wait_for_step(halves, 12, ranks)
    kill(ranks)
    run_in_process(halves, "--device", "cuda")
    actual, expected = losses(tmp_path / "halves" / "out"), losses(tmp_path / "whole" / "out")
    assert actual.keys() == expected.keys()
    assert all(math.isclose(actual[step], expected[step], rel_tol=1e-4) for step in expected)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cast", [False, True])
def test_generation(dtype, cast):
    model = toy_model(**SWIGLU, domains_out=["grid", "text"]).eval().cuda()
    model = model.to(dtype) if cast and dtype else model
    batch = {"pixels": {"tensor": torch.randn(2, 3, 16, 16)}}
    batch = init_full_input_modality(batch, model.modality_info, "pixels", "cuda")
    targets = ["grid", "text"]
    schedule = build_chained_generation_schedules(
        ["pixels"],
        targets,
        [16, 8],
        ["maskgit", "autoregressive"],
        [3, None],
        ["linear", None],
        [1.0, 0.5],
        ["constant"] * 2,
        [2.0, 2.0],
        ["constant"] * 2,
        modality_info=model.modality_info,
    )
    batch = init_empty_target_modality(batch, model.modality_info, "grid", 2, 16, "cuda")
    sampler = GenerationSampler(model, None if cast else dtype)
    for seed in (0, torch.Generator("cuda").manual_seed(0)):
        result = sampler.generate(batch, schedule, top_p=0.9, top_k=10, seed=seed)
        assert result["grid"]["tensor"].is_cuda and not result["grid"]["input_mask"].any()
    replayed = GenerationSampler(model, sampler.dtype, cuda_graphs=True)
    texts = [sampler.generate(batch, schedule[-1:], seed=0)[targets[-1]] for sampler in (sampler, replayed)]
    assert dtype or torch.equal(texts[0]["tensor"], texts[1]["tensor"])


def test_a_step_never_waits_for_the_device():
    model = toy_model(**SWIGLU).cuda()
    batch = toy_batch(model)
    selection = model.select_tokens(batch, 10, 9).to("cuda", non_blocking=True)
    batch = {name: {key: value.cuda() for key, value in entry.items()} for name, entry in batch.items()}
    model(batch, 10, 9, selection=selection)[0].backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(batch, 10, 9, selection=selection)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class OneProcess(FSDP):
    """Shards although there is a single process."""

    def __init__(self, config):
        super().__init__(config)
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
        self.distributed, self._mesh = True, self._build_mesh(1)


def test_sharded_training_has_the_losses_of_a_plain_run(tmp_path):
    plain, sharded = write_run(tmp_path / "plain"), write_run(tmp_path / "sharded")
    run_in_process(plain, "--device", "cuda")
    assert main(Pretrain, OneProcess, ["--config", str(sharded), "--device", "cuda"]) == 0
    actual, expected = losses(tmp_path / "sharded" / "out"), losses(tmp_path / "plain" / "out")
    assert all(math.isclose(actual[step], expected[step], rel_tol=1e-3) for step in expected)

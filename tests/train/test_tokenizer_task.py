"""A tokenizer is trained by the loop of 4M, from pictures in a folder to a folder that tokenizes and decodes."""

import contextlib
import dataclasses
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fourm.models.model_card import read_facts
from fourm.tools.pack import main as pack
from fourm.train.config import load_config
from fourm.train.export import main as export
from fourm.train.fsdp import FSDP
from fourm.train.parallel import DDP
from fourm.train.tasks.diffusion_tokenizer import DiVAETraining
from fourm.train.tasks.tokenizer import VQVAETraining
from fourm.utils.checkpoints import newest_checkpoint
from fourm.utils.errors import UserError
from fourm.utils.model_store import copy_checkpoint
from fourm.utils.s3 import S3Store
from fourm.vq import load_tokenizer
from tests.data.object_store import BUCKET, ObjectStore
from tests.train.tokenizer_data import write_config, write_pictures
from tests.train.toy_run import kill, log_lines, losses, run_in_process, run_ranks, start_ranks, wait_for_step

CODES = ("quantize._codebook.embed", "quantize._codebook.cluster_size")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def alone(pictures, tmp_path_factory):
    """A run of one process with accumulation, of which two processes do half of each step."""
    config = write_config(tmp_path_factory.mktemp("alone"), pictures, batch_size=2, accum_iter=2, num_streams=2)
    run_in_process(config, task=VQVAETraining)
    return config.parent / "out"


def evaluations(out):
    return [line["eval"]["rgb"] for line in log_lines(out) if "eval" in line]


def test_its_card_tells_losses_from_metrics(alone):
    for row in read_facts(alone / "model.safetensors")["Results"]:
        assert {"loss", "loss of reconstruction", "psnr", "mse", "perplexity"} <= row.keys()
        assert [name for name in row if name.startswith("loss of")] == ["loss of reconstruction"]


def test_it_learns_and_its_codes_come_to_be_used(alone):
    found = losses(alone)
    assert len(found) == 20 and found[20] < 0.5 * found[1]
    first, last = evaluations(alone)
    assert last.keys() == {"16px", "16px_ema", "32px", "32px_ema"}
    for kind, results in last.items():
        assert results["loss"] == pytest.approx(results["per_modality"]["mse"]) and results["samples"] == 6
        assert results["per_modality"]["psnr"] > 10 and 0.2 < results["metrics"]["code_usage"] <= 1
        assert results["loss"] < 1.1 * first[kind]["loss"] and 4 < results["metrics"]["perplexity"] <= 24
    weights, average = load_file(alone / "model.safetensors"), load_file(alone / "ema" / "model.safetensors")
    for name in CODES:
        assert not torch.allclose(weights[name], average[name], rtol=1e-3)
    lengths = weights[CODES[0]].norm(dim=1)
    assert ((lengths > 0.3) & (lengths < 1.01)).all()


@pytest.fixture(scope="module")
def together(pictures, tmp_path_factory):
    """The same run by two processes under DDP."""
    config = write_config(tmp_path_factory.mktemp("together"), pictures, batch_size=2)
    run_ranks(config, strategy=DDP, task=VQVAETraining)
    return config.parent / "out"


@pytest.mark.dist
@pytest.mark.parametrize("strategy", [DDP, FSDP])
def test_two_processes_train_it_as_one(alone, pictures, tmp_path, strategy, request):
    if strategy is DDP:
        out = request.getfixturevalue("together")
    else:
        run_ranks(write_config(tmp_path, pictures, batch_size=2), strategy=strategy, task=VQVAETraining)
        out = tmp_path / "out"
    assert losses(out) == pytest.approx(losses(alone), rel=1e-3)
    weights, wanted = load_file(out / "model.safetensors"), load_file(alone / "model.safetensors")
    assert weights.keys() == wanted.keys()
    for name in CODES:
        torch.testing.assert_close(weights[name], wanted[name], rtol=1e-3, atol=1e-3)
    for one, two in zip(evaluations(alone), evaluations(out), strict=True):
        for kind, results in one.items():
            assert two[kind]["per_modality"] == pytest.approx(results["per_modality"], rel=1e-2)
            assert two[kind]["metrics"] == pytest.approx(results["metrics"], rel=1e-2)


def assert_same_end(one, other):
    """The runs had the same losses and ended with the same weights and moving averages, bit by bit."""
    assert losses(one) == losses(other)
    for folder in (".", "ema"):
        weights, expected = (load_file(out / folder / "model.safetensors") for out in (one, other))
        assert weights.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


@contextlib.contextmanager
def killed(config, processes, step, task):
    """Kill a run with SIGKILL once it has a checkpoint of ``step``, and resume it to its end after the context."""
    ranks = start_ranks(config, strategy=DDP, processes=processes, task=task)
    wait_for_step(config, step, ranks)
    kill(ranks)
    yield config.parent / "out"
    run_ranks(config, "--save_every_minutes", 0, strategy=DDP, processes=processes, task=task)
    assert "resumed from" in (config.parent / "out" / "log.txt").read_text()


@pytest.mark.dist
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_it_resumes_with_the_same_losses_and_codes(pictures, tmp_path, processes, request):
    whole, keys = "together", {"batch_size": 2, "save_every_minutes": 1e-9}
    if processes == 1:
        whole, keys = "alone", keys | {"accum_iter": 2, "num_streams": 2}
    config = write_config(tmp_path, pictures, **keys)
    with killed(config, processes, 7, VQVAETraining) as out:
        # An unfinished run is a tokenizer, and so is each of its checkpoints.
        unfinished, checkpoint = load_tokenizer(out), newest_checkpoint(out)
        x = torch.rand(2, 3, 32, 32) * 2 - 1
        ids = load_tokenizer(checkpoint, encoder_only=True).tokenize(x)
        assert torch.equal(unfinished.tokenize(x), ids) and unfinished.info.modality == "rgb"
        assert unfinished.decode_tokens(ids).shape == x.shape
        export([str(checkpoint), str(tmp_path / "exported")])
        assert torch.equal(load_tokenizer(tmp_path / "exported").tokenize(x), ids)
    assert_same_end(tmp_path / "out", request.getfixturevalue(whole))


def test_its_folder_and_its_export_tokenize_and_decode(alone, pictures, tmp_path):
    export([str(alone), str(tmp_path / "exported")])
    tokenizer = load_tokenizer(alone)
    paths = sorted((pictures / "val").rglob("*.png"))
    images = np.stack([np.asarray(Image.open(path).resize((32, 32), Image.Resampling.BICUBIC)) for path in paths])
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    ids = tokenizer.tokenize(x)
    assert ids.shape == (6, 4, 4) and ids.max() < tokenizer.vocab_size == 24
    with torch.no_grad():
        decoded = tokenizer.decode_tokens(ids)
        evaluated = evaluations(alone)[-1]["32px"]["per_modality"]["mse"]
        assert (decoded - x).square().mean().item() == pytest.approx(evaluated, rel=0.05)
        again = load_tokenizer(tmp_path / "exported")
        assert torch.equal(again.tokenize(x), ids) and torch.equal(again.decode_tokens(ids), decoded)
    stored = json.loads((alone / "config.json").read_text())
    assert stored["modality"] == "rgb" and stored["transform_options"] == {"imagenet_default_mean_and_std": False}
    assert tokenizer.tokenize(torch.zeros(1, 3, 48, 48)).shape == (1, 6, 6)
    assert load_tokenizer(alone).training_facts["Data"] == [{"domain": "rgb", "sides in pixels": ["16", "32"]}]


def test_it_is_evaluated_planned_and_tried_out(alone, tmp_path):
    config = alone.parent / "main.yaml"
    evaluated = run_in_process(config, "--eval", task=VQVAETraining)
    results = evaluations(alone)[-1]
    for size in ("16px", "32px"):
        assert f"loss {results[size]['loss']:.4f}" in evaluated
    assert f"perplexity {results['32px']['metrics']['perplexity']:.3f}" in evaluated
    plan = run_in_process(config, "--plan", "--plan_world_size", "2", "--data_path", "''", task=VQVAETraining)
    assert "8 samples (2 x batch_size 2 x accum_iter 2)" in plan and "parameters of the blocks" in plan
    assert "dry run: one step" in run_in_process(
        config, "--dry_run", "--output_dir", tmp_path / "new", task=VQVAETraining
    )


def test_the_operations_of_attention_are_counted(pictures, tmp_path):
    task = VQVAETraining(load_config(VQVAETraining.config_class, write_config(tmp_path, pictures, batch_size=1)))
    small, large = (
        task.step_cost(task.build_model()).flops
        for task in (
            VQVAETraining(dataclasses.replace(task.config, input_size_max=size, input_size_eval=size))
            for size in (16, 32)
        )
    )
    # All other operations are proportional to the number of tokens, here 4 and 16. Each of two blocks has two matrix
    # products for attention, with vectors of 32 numbers; a backward pass counts as two forward passes.
    assert large - 4 * small == 3 * 2 * 2 * (2 * 32) * (16**2 - 4 * 4**2)


def test_steps_are_of_random_sizes_that_depend_on_the_seed_and_the_step_alone(pictures, tmp_path):
    config = load_config(VQVAETraining.config_class, write_config(tmp_path, pictures, accum_iter=2, batch_size=2))
    sides = {}
    for rank in (0, 1):
        task = VQVAETraining(config)
        with torch.device("cpu"):
            batches = iter(task.train_batches(rank, 2, 10, 0, {}, False))
        for _ in range(16):
            batch = next(batches)
            values = task.prepare(None, batch, torch.device("cpu")).values
            sides.setdefault(batch.number // 2, set()).add(values.images.shape[-1])
            assert values.part.count == 4 and values.part.index == 2 * (batch.number % 2) + rank
    assert all(len(found) == 1 for found in sides.values())
    assert set.union(*sides.values()) == {16, 32}


def test_a_second_stage_starts_from_the_first_at_a_larger_size(alone, pictures, tmp_path):
    keys = {"full_ckpt": str(alone), "input_size_max": 48, "blr": 0.0, "quantizer_ema_decay": 1.0, "epochs": 1}
    logged = run_in_process(write_config(tmp_path / "a", pictures, **keys, coef_ema_dead_code=0), task=VQVAETraining)
    first, second = (load_file(out / "model.safetensors") for out in (alone, tmp_path / "a" / "out"))
    assert "finetune: " in logged and second["encoder.pos_emb"].shape[-1] == 6
    kept = [name for name in first if "pos_emb" not in name and "cluster_size" not in name]
    assert all(torch.equal(first[name], second[name]) for name in kept)
    with pytest.raises(UserError, match="'input_size_enc' 32: set it"):
        run_in_process(write_config(tmp_path / "b", pictures, **keys, freeze_enc=True), task=VQVAETraining)
    run_in_process(
        write_config(tmp_path / "c", pictures, **keys | {"blr": 0.1}, freeze_enc=True, input_size_enc=32),
        task=VQVAETraining,
    )
    frozen = load_file(tmp_path / "c" / "out" / "model.safetensors")
    for name, tensor in frozen.items():
        if name.startswith(("encoder.", "quant")):
            assert torch.equal(tensor, first[name]), name
    assert not torch.equal(frozen["decoder.out_proj.weight"], first["decoder.out_proj.weight"])


DIVAE = {
    "decoder_type": "unet_patched/Wi_32",
    "input_size_min": 32,
    "batch_size": 2,
    "num_eval_timesteps": 2,
    "epochs": 1,
    "blr": 0.05,
    "num_eval_metrics_samples": 3,
    "epoch_size": 24,
}


@pytest.fixture(scope="module")
def divae(pictures, tmp_path_factory):
    config = write_config(tmp_path_factory.mktemp("divae"), pictures, **DIVAE, accum_iter=2, num_streams=2)
    run_in_process(config, task=DiVAETraining)
    return config.parent / "out"


def test_a_divae_learns_and_its_folder_decodes(divae):
    found = losses(divae)
    assert len(found) == 6 and found[6] < 0.9 * found[1]
    (results,) = evaluations(divae)
    assert results["32px"]["samples"] == 3 and results["32px"]["per_modality"].keys() == {
        "reconstruction",
        "l1",
        "mse",
        "psnr",
    }
    tokenizer = load_tokenizer(divae)
    decoded = tokenizer.decode_tokens(torch.zeros(1, 4, 4, dtype=torch.int64), timesteps=2, seed=0)
    assert decoded.shape == (1, 3, 32, 32) and decoded.abs().max() <= 1


@pytest.fixture(scope="module")
def divae_together(pictures, tmp_path_factory):
    """The same run by two processes under DDP."""
    config = write_config(tmp_path_factory.mktemp("divae_together"), pictures, **DIVAE)
    run_ranks(config, strategy=DDP, task=DiVAETraining)
    return config.parent / "out"


@pytest.mark.dist
@pytest.mark.parametrize("strategy", [DDP, FSDP])
def test_two_processes_train_a_divae_as_one(divae, pictures, tmp_path, strategy, request):
    if strategy is DDP:
        out = request.getfixturevalue("divae_together")
    else:
        run_ranks(write_config(tmp_path, pictures, **DIVAE), strategy=strategy, task=DiVAETraining)
        out = tmp_path / "out"
    assert losses(out) == pytest.approx(losses(divae), rel=1e-2)
    one, two = (evaluations(place)[0] for place in (divae, out))
    for kind in ("32px", "32px_ema"):
        assert two[kind]["per_modality"] == pytest.approx(one[kind]["per_modality"], rel=2e-2)


@pytest.mark.dist
@pytest.mark.parametrize("processes", [1, 2])
def test_a_divae_that_was_killed_resumes_with_the_same_losses(pictures, tmp_path, processes, request):
    whole, keys = "divae_together", DIVAE | {"save_every_minutes": 1e-9, "keep_last": 1}
    if processes == 1:
        whole, keys = "divae", keys | {"accum_iter": 2, "num_streams": 2}
    config = write_config(tmp_path, pictures, **keys)
    with killed(config, processes, 2, DiVAETraining) as out:
        assert type(load_tokenizer(out)).__name__ == "DiVAE"
    assert_same_end(tmp_path / "out", request.getfixturevalue(whole))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"domain": "rbg"}, "'domain': unknown 'rbg' \\(did you mean 'rgb'\\?\\)"),
        ({"codebok_size": 8}, "unknown key 'codebok_size' \\(did you mean 'codebook_size'\\?\\)"),
        ({"input_size_max": 40}, "'input_size_max' 40 must be input_size_min 16 plus a multiple of resolution_step 16"),
        ({"percept_loss_weight": 1.0}, "'percept_model' names no network"),
        ({"min_lr": 1e-6}, "set 'min_blr'"),
        ({"domain": "semseg"}, "'n_labels' is not set"),
        ({"data_path": ""}, "'data_path' is not set"),
        ({"loss_fn": "mes"}, "'loss_fn' must be one of .* \\(did you mean 'mse'\\?\\)"),
        ({"ms_ssim": True}, "'ms_ssim' needs pictures of at least 176 pixels"),
        ({"domain": "depth", "fid_network": "test_vit"}, "'fid_network' compares pictures .* which depth is not"),
        ({"fid_network": "test_vitt"}, "timm has no network 'test_vitt' \\(did you mean"),
        ({"encoder_type": "vit_x_enc"}, "unknown vision transformer 'vit_x_enc' \\(did you mean"),
    ],
)
def test_what_cannot_work_is_one_sentence(pictures, tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        run_in_process(write_config(tmp_path, pictures, **keys), "--dry_run", task=VQVAETraining)


def test_every_evaluation_leaves_a_picture_of_originals_and_reconstructions(alone):
    found = sorted(path.name for path in (alone / "pictures").iterdir())
    kinds = ("16px", "16px_ema", "32px", "32px_ema")
    assert found == sorted(f"step-{step:08d}-rgb-{kind}.png" for step in (10, 20) for kind in kinds)
    with Image.open(alone / "pictures" / "step-00000020-rgb-32px.png") as picture:
        assert picture.width > picture.height / 4 and np.ptp(np.asarray(picture)) > 100


def test_features_of_a_network_are_made_on_the_fly(pictures, tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("test_vit")
    save_file(network.state_dict(), tmp_path / "vit.safetensors")
    keys = {
        "domain": "CLIP-B16",
        "feature_network": "test_vit",
        "feature_weights": f"{tmp_path}/vit.safetensors",
        "patch_size": 16,
        "n_channels": network.num_classes,
        "loss_fn": "smooth_l1",
        "epochs": 1,
        "codebook_size": 16,
    }
    run_in_process(write_config(tmp_path, pictures, **keys), task=VQVAETraining)
    results = log_lines(tmp_path / "out")[-1]["eval"]["CLIP-B16"]["32px"]
    assert results["samples"] == 6 and results["per_modality"].keys() == {"reconstruction", "l1", "mse"}
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.tokenize(torch.zeros(1, network.num_classes, 2, 2)).shape == (1, 2, 2)
    assert tokenizer.feature_network == "test_vit"  # of which save_vq_tokens makes the features, too


def test_a_perceptual_loss_is_part_of_the_total(pictures, tmp_path):
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    keys = {
        "percept_loss_weight": 0.5,
        "percept_model": "test_vit",
        "percept_weights": f"{tmp_path}/vit.safetensors",
        "percept_layers": "blocks.1-blocks.3",
        "dtype_percept": "fp32",
        "epoch_size": 8,
        "epochs": 1,
    }
    run_in_process(write_config(tmp_path, pictures, **keys), task=VQVAETraining)
    first, *_ = log_lines(tmp_path / "out")
    assert first["losses"].keys() == {"reconstruction", "codebook", "perceptual"} and first["losses"]["perceptual"] > 0
    assert first["loss"] == pytest.approx(sum(first["losses"].values()), rel=1e-4)


def test_depth_is_evaluated_by_its_relative_error(pictures, tmp_path):
    for path in pictures.rglob("*.png"):
        split, _, *rest = path.relative_to(pictures).parts
        target = tmp_path.joinpath(split, "depth", *rest)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((np.asarray(Image.open(path).convert("L"), np.uint16) + 20) * 200).save(target)
    keys = {"domain": "depth", "epochs": 1, "epoch_size": 8, "model_ema": False}
    run_in_process(write_config(tmp_path, tmp_path, **keys), task=VQVAETraining)
    for results in log_lines(tmp_path / "out")[-1]["eval"]["depth"].values():
        errors = results["per_modality"]
        assert errors.keys() == {"reconstruction", "l1", "mse", "abs_rel", "abs_rel_fitted"}
        assert errors["reconstruction"] == pytest.approx(errors["mse"])  # of standardised depth, as in training
        assert 0 < errors["abs_rel_fitted"] < 1.2 * errors["abs_rel"] < 5


@pytest.mark.dist
def test_fid_and_ms_ssim_are_reported_whatever_the_number_of_processes(alone, pictures, tmp_path):
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    keys = {
        "fid_network": "test_vit",
        "fid_weights": f"{tmp_path}/vit.safetensors",
        "ms_ssim": True,
        "input_size_eval": 176,
        "finetune": str(alone),
        "epochs": 1,
        "epoch_size": 8,
        "blr": 0.0,
        "model_ema": False,
        "quantizer_ema_decay": 1.0,
        "coef_ema_dead_code": 0,
    }
    run_in_process(write_config(tmp_path / "one", pictures, **keys), task=VQVAETraining)
    run_ranks(write_config(tmp_path / "two", pictures, **keys), strategy=DDP, task=VQVAETraining)
    one, two = (evaluations(tmp_path / name / "out")[0] for name in ("one", "two"))
    assert one.keys() == {"16px", "32px", "176px"}
    for size, results in one.items():
        assert results["metrics"]["fid"] > 0 and ("ms_ssim" in results["per_modality"]) == (size == "176px")
        assert two[size]["metrics"] == pytest.approx(results["metrics"], rel=1e-3)
    assert 0 < one["176px"]["per_modality"]["ms_ssim"] < 1
    assert "no MS-SSIM at 16 and 32 pixels: it needs 176" in (tmp_path / "two" / "out" / "log.txt").read_text()


def test_shards_are_trained_on_as_folders_are(pictures, tmp_path):
    pack(["shards", str(pictures / "train"), str(tmp_path / "train"), "--shard_size", "5"])
    for path in (f"{tmp_path}/train", f"{tmp_path}/train/[rgb]/shard-{{00000..00003}}.tar"):
        keys = {"data_path": path, "use_wds": True, "num_workers": 2}
        config = write_config(tmp_path / "a", pictures, **keys)
        assert "dry run: one step" in run_in_process(config, "--dry_run", task=VQVAETraining)
    with pytest.raises(UserError, match="'epoch_size' is not set"):
        run_in_process(write_config(tmp_path / "b", pictures, **keys, epoch_size=-1), "--dry_run", task=VQVAETraining)


def test_remote_shards_are_trained_on_as_local_ones_and_the_tokenizer_is_loaded_from_there(
    alone, pictures, tmp_path, monkeypatch
):
    for name, value in {"AWS_ACCESS_KEY_ID": "toy-key", "AWS_SECRET_ACCESS_KEY": "toy-secret"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split in ("train", "val"):
        pack(["shards", str(pictures / split), str(tmp_path / "data" / split), "--shard_size", "5"])
    store = ObjectStore(tmp_path / "data")
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", store.endpoint)
        keys = {"use_wds": True, "epochs": 1, "data_cache_dir": f"{tmp_path}/shards", "batch_size": 8}
        for name, root in (("local", f"{tmp_path}/data"), ("remote", f"s3://{BUCKET}")):
            paths = {
                "data_path": f"{root}/train/[rgb]/shard-{{00000..00003}}.tar",
                "eval_data_path": f"{root}/val/[rgb]/shard-{{00000..00001}}.tar",
            }
            run_in_process(write_config(tmp_path / name, pictures, **keys, **paths), task=VQVAETraining)
        assert losses(tmp_path / "remote" / "out") == losses(tmp_path / "local" / "out")
        assert evaluations(tmp_path / "remote" / "out") == evaluations(tmp_path / "local" / "out")
        for name in ("config.json", "model.safetensors"):
            S3Store().upload(alone / name, f"s3://{BUCKET}/finished/{name}")
        copy_checkpoint(newest_checkpoint(alone), f"s3://{BUCKET}/unfinished", S3Store(), 0)
        x = torch.rand(2, 3, 32, 32) * 2 - 1
        ids = load_tokenizer(alone).tokenize(x)
        for place in ("finished", "unfinished"):
            assert torch.equal(load_tokenizer(f"s3://{BUCKET}/{place}").tokenize(x), ids)
    finally:
        store.kill()


def test_an_epoch_of_a_folder_is_its_number_of_pictures(pictures, tmp_path):
    logged = run_in_process(write_config(tmp_path, pictures, epoch_size=-1), "--dry_run", task=VQVAETraining)
    assert "2 epochs of 5 steps" in logged

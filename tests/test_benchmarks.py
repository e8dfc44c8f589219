"""The benchmarks print the figures that the documentation quotes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks import ablations, gpu, loader_trees, time_to_loss
from benchmarks.embed_all import saved_bytes
from fourm.train.step import Trainer
from fourm.utils.errors import UserError
from tests.models.toy_models import SWIGLU, toy_batch, toy_model
from tests.train.toy_run import write_run
from tests.warm_python import warm_python

ROOT = Path(__file__).parent.parent
SMALL = ["--batch_size", "1", "--tokens", "32", "--rounds", "1"]


def lines(*command: str) -> list[dict]:
    process = subprocess.run(
        [warm_python(), *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.returncode == 0 and "FutureWarning" not in process.stderr, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_the_training_step_has_the_loss_of_the_baseline_and_needs_less_memory():
    (line,) = lines("benchmarks/train_step.py", *SMALL, "--peak_tflops", "1")
    assert line["loss"]["ours"] == pytest.approx(line["loss"]["baseline"], rel=1e-5)
    baseline = line["compared"]["baseline"]
    assert baseline["memory_ratio"] > 1.1
    assert baseline["speed_up_in_cpu_seconds"] > 0  # the amount depends on the load of the machine
    assert line["mfu"] == pytest.approx(line["tflops"]) and line["peak_memory"] > 10**8
    assert line["samples_per_second"] == pytest.approx(1 / line["seconds_per_step"])


def test_every_switch_takes_one_optimization_away():
    def step(pack, *switched_off):
        """Return the tokens and the mask of the first block, and the bytes that are kept for the backward pass."""
        seen = []
        hook = model.encoder[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[:2]))
        with contextlib.ExitStack() as stack:
            for name in switched_off:
                stack.enter_context(ablations.SWITCHES[name](model))
            selection = model.select_tokens(batch, 18, 18, pack=pack)
            kept = saved_bytes(lambda: model(batch, 18, 18, selection=selection)[0], model)
        hook.remove()
        return *seen[0], kept

    model = toy_model(**SWIGLU)
    batch = toy_batch(model)
    _, mask, kept = step(False)
    assert mask is None and step(False, "unmasked_attention")[1] is not None
    assert step(False, "recomputed_products")[2] > kept
    batch["grid"]["input_mask"][1] = True
    tokens, mask, _ = step(True)
    assert tokens.ndim == 2 and step(True, "packing")[0].ndim == 3
    assert mask.is_floating_point() and step(True, "additive_masks")[1].dtype == torch.bool


@pytest.mark.slow
@pytest.mark.dist
def test_the_matrix_runs_under_torchrun_and_fits_exponents():
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    *rows, fit = lines(
        *launcher,
        "benchmarks/train_step.py",
        *SMALL,
        "--model",
        "tiny",
        "--modalities",
        "7",
        "14",
        "--fit",
        "--opt",
        "sgd",
    )
    assert [(row["modalities"], row["strategy"], row["world_size"]) for row in rows] == [(7, "ddp", 2), (14, "ddp", 2)]
    assert set(fit["exponents of cpu_seconds_per_step"]) == {"modalities"}, "one size of model says nothing of sizes"


@pytest.mark.slow
def test_generation_takes_turns_with_another_checkout():
    options = ["--toy", "--only", "maskgit_8", "--repeats", "1", "--before", str(ROOT)]
    (line,) = lines("benchmarks/generate.py", *options)
    cases = line["processor_seconds"]
    assert len(cases) == 2 and all(case["same_tokens"] and case["ratio"] > 0 for case in cases.values())


@pytest.mark.slow
def test_decoding_a_batch_is_compared_with_single_images():
    options = ["--divae", "--images", "3", "--batch_size", "2", "--steps", "1", "--rounds", "1"]
    codebook, divae = lines("benchmarks/decode_batch.py", "fourm/demo/trained/depth", *options)
    assert [row["tokenizer"] for row in (codebook, divae)] == ["depth", "divae"]
    assert all(row["difference"] < 1e-4 and row["ratio"][0] > 0 for row in (codebook, divae))


@pytest.mark.slow
def test_optimizers_are_compared_by_the_steps_to_the_same_loss(tmp_path, capsys):
    variants = {"--base": "adamw:opt=adamw,blr=0.01", "--variants": "muon:opt=muon,blr=1"}
    options = {"--steps": 6, "--eval_every": 2, "--seeds": 0, **variants, "--timed_steps": 1}
    arguments = [str(part) for option in options.items() for part in option]
    config = write_run(tmp_path / "toys", num_workers=0)
    time_to_loss.main(["--config", str(config), "--out", str(tmp_path / "out"), *arguments])
    adamw, muon, result = map(json.loads, capsys.readouterr().out.splitlines())
    assert list(adamw["losses"]) == list(muon["losses"]) == ["2", "4", "6"]
    assert result["final_losses"]["adamw"] == [adamw["losses"]["6"]]
    assert [overrides["blr"] for overrides in result["overrides"].values()] == [0.01, 1]
    assert result["fewer_steps"] > 1, "its learning rate is a hundred times higher"
    for clock, cost in result["cost_of_a_step"].items():
        assert result["fewer_seconds"][clock] == pytest.approx(result["fewer_steps"] / cost["ratio"])
    assert time_to_loss.steps_to(3.0, {10: 5.0, 20: 4.0, 30: 2.0}) == 25 and time_to_loss.steps_to(6.0, {10: 5.0}) == 10
    assert time_to_loss.steps_to(1.0, {10: 5.0, 20: 4.0}) is None
    with pytest.raises(UserError, match="is a run with another epoch_size: choose another --out"):
        time_to_loss.main(["--config", str(config), "--out", str(tmp_path / "out"), *arguments, "--steps", "7"])


@pytest.mark.slow
def test_variants_are_compared_with_a_base_seed_by_seed(tmp_path, capsys):
    config = write_run(tmp_path / "toys", num_workers=0)
    options = ["--config", str(config), "--out", str(tmp_path / "out"), "--timed_steps", "1"]
    options += ["--steps", "4", "--eval_every", "2", "--seeds", "0", "1", "--base", "toy:blr=1e-3|0.1"]
    ways = ["idle:blr=0", "average:model_ema=true", "heads:model_kwargs.num_heads=4,model_kwargs.qk_norm=true"]
    time_to_loss.main([*options, "--variants", *ways])
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    low, high, *_ = runs = [line for line in printed if "losses" in line]
    assert len(runs) == 3 + 3 * 2 and low["losses"]["4"] > high["losses"]["4"] and low["seed"] == high["seed"] == 0
    idle, average, heads = (line for line in printed if "difference" in line)
    for line in (idle, average, heads):
        (base, losses), differences = line["final_losses"].values(), line["difference"]
        assert line["overrides"]["toy"] == {"blr": 0.1} and base[0] == high["losses"]["4"] and base[0] != base[1]
        assert differences["mean"] == pytest.approx(sum(losses) / 2 - sum(base) / 2) and differences["stdev"] > 0
        assert line["fewer_steps"] == pytest.approx(sum(line["fewer_steps_by_seed"]) / 2)
    assert idle["difference"]["mean"] > average["difference"]["mean"] > 0, "an average of four steps lags behind"
    assert idle["fewer_steps"] < 1 and heads["overrides"]["heads"]["model_kwargs.num_heads"] == 4
    saved = yaml.safe_load(next((tmp_path / "out" / "heads").glob("*/seed-0/config.yaml")).read_text())
    assert saved["model_kwargs"]["dim"] == 32 and saved["model_kwargs"]["qk_norm"] is True
    for way, message in (
        ("a:blr", "'a:blr': write a variant as"),
        ("a/b", "the name of a variant"),
        ("toy", "same name"),
    ):
        with pytest.raises(UserError, match=message):
            time_to_loss.main([*options, "--variants", way])


def test_the_timed_steps_are_spread_over_the_length_of_a_run(tmp_path, monkeypatch):
    config = write_run(tmp_path / "toys", num_workers=0)
    options = Namespace(config=str(config), data=None, out=tmp_path, steps=8, eval_every=8, timed_steps=4)
    settings = [time_to_loss.Setting(f"toy{n}", {"batch_warmup_steps": n}, 0) for n in (0, 4)]
    step, updates = Trainer.train_step, {0: [], 4: []}

    def record(trainer, batches):
        updates[trainer.config.batch_warmup_steps].append(trainer.task.updates(trainer.step))
        step(trainer, batches)

    monkeypatch.setattr(Trainer, "train_step", record)
    costs = time_to_loss.step_costs(settings, options, time_to_loss.shared_overrides(options))
    assert updates == {0: [1] * 10, 4: [4] * 3 + [2] * 3 + [1] * 4}, "two are not timed, of each number of updates"
    for cost in costs["toy4"].values():
        assert cost["toy4"] == pytest.approx(cost["toy0"] * cost["ratio"]) and cost["ratio"] > 0


def test_the_mean_cost_of_a_step_counts_its_kinds_by_their_share_and_without_disturbances():
    kinds, ours = [4, 2, *[1] * 6], [1.0, 1.0, 1.0, 1.0, 9.0, 1.0, 1.0, 1.0]
    theirs = [3.0, 2.0, 1.0, 1.0, 9.0, 1.0, 7.0, 1.0]
    assert time_to_loss.mean_costs(kinds, ours, theirs) == (1.0, 11 / 8, 11 / 8)


@pytest.mark.slow
def test_a_comparison_that_a_signal_stops_continues_where_it_was(tmp_path, capsys):
    def stop_the_run():
        while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    config = write_run(tmp_path / "toys", num_workers=0)
    options = ["--config", str(config), "--out", str(tmp_path / "out"), "--timed_steps", "1", "--seeds", "0"]
    options += ["--steps", "20", "--eval_every", "20", "--base", "toy", "--variants", "idle:blr=0"]
    stopper = threading.Thread(target=stop_the_run)
    stopper.start()
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        time_to_loss.main(options)
    stopper.join()
    assert not capsys.readouterr().out
    time_to_loss.main(options)
    toy, idle, _ = map(json.loads, capsys.readouterr().out.splitlines())
    assert list(toy["losses"]) == list(idle["losses"]) == ["20"]
    (log,) = tmp_path.glob("out/toy/*/*/log.txt")
    assert "the same command goes on from there" in log.read_text()


@pytest.mark.slow
def test_the_loader_and_the_memory_of_its_worker_are_measured_with_all_modalities():
    small = ["--repeats", "2", "--batch_size", "2", "--shards", "1", "--per_shard", "3"]
    seven, all_of_them = lines("benchmarks/loader.py", *small, "--modalities", "7", "21", "--samples", "8")
    assert (seven["modalities"], all_of_them["modalities"]) == (7, 21) and seven["batch_mb"] < all_of_them["batch_mb"]
    (single,) = lines("benchmarks/loader.py", *small, "--single", "--samples", "8")
    for line in (seven, all_of_them, single):
        stages = ("read", "preprocess", "budgets", "transform", "masking", "collate")
        assert all(line[f"{stage}_ms"] > 0 for stage in stages)
    steps = lines("benchmarks/loader.py", *small, "--modalities", "21", "--memory_samples", "40")
    assert [step["samples"] for step in steps] == [*range(4, 44, 4)]
    assert all(step["num_workers"] == 1 and step["workers_resident_mb"] > 100 for step in steps)


@pytest.mark.slow
def test_two_versions_of_the_loader_are_compared_on_equal_samples(capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    toy = {"--shards": 1, "--per_shard": 3, "--warm_up": 2, "--samples": 4, "--rounds": 2, "--repeats": 2}
    loader_trees.main(["--before", str(ROOT), *(str(part) for option in toy.items() for part in option)])
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert line["equal"] is True and line["modalities"] == 7 and line["repeats"] == 2
    assert line["ratio"] == sorted(line["ratio"]) and line["before"] > 0 and line["now"] > 0


@pytest.mark.slow
def test_tokenizers_are_measured_beside_a_plain_implementation_that_computes_the_same():
    cases = ["tokenize", "decode_vqvae", "decode_divae", "unet_step", "train_vqvae", "train_divae"]
    options = ["--toy", "--batch_size", "2", "--steps", "2", "--rounds", "2", "--peak_tflops", "1"]
    rows = {row["case"]: row for row in lines("benchmarks/image_tokenizers.py", *options)}
    assert list(rows) == cases
    for case, row in rows.items():
        median, low, high = row["speed_up_over_plain_in_cpu_seconds"]  # the amount depends on the load of the machine
        assert 0 < low <= median <= high
        assert row["mfu"] == pytest.approx(row["tflops"]) and row["tflops"] > 0
        assert ("speed_up_over_one_at_a_time_in_seconds" in row) == (not case.startswith("train"))
    assert rows["tokenize"]["difference"] == 0 and rows["decode_vqvae"]["difference"] < 1e-4
    assert rows["unet_step"]["difference"] < 1e-3
    step = rows["decode_divae"]["seconds_per_unet_step"]
    assert step == pytest.approx(rows["decode_divae"]["seconds_per_image"]["ours"] / 2)
    assert rows["decode_divae"]["seconds_per_image_of_50_steps"] == pytest.approx(50 * step)
    for case in ("train_vqvae", "train_divae"):
        assert rows[case]["loss"]["ours"] == pytest.approx(rows[case]["loss"]["plain"], rel=1e-4)
        assert rows[case]["step_memory"]["ours"] > 0 and rows[case]["peak_memory"] > 10**8


@pytest.mark.slow
def test_ways_to_convolve_are_measured_beside_each_other_and_compute_the_same():
    step, *sizes = lines("benchmarks/convolutions.py", "--toy", "--rounds", "2", "--batch_size", "1", "2")
    for shares in step["share"].values():
        assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0 < shares["Conv3x3"]
    assert step["transforming"]["bytes"] > 0 and step["seconds"]["plain"][0] > 0
    assert [(row["channels"], row["side"]) for row in sizes] == [(32, 16), (32, 7)]
    for row in sizes:
        errors = row["error"]
        assert errors["plain"] != errors["winograd_at_once"] and errors["bfloat16"] > 1e-4, "the ways are different"
        assert (errors["winograd"] == errors["plain"]) == (row["side"] == 7), "small maps are convolved plainly"
        for name in errors:
            assert list(row[name]) == ["1", "2"]
            assert all(
                low <= median <= high for values in row[name].values() for median, low, high in [values["ratio"]]
            )


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has better to do")
def test_all_steps_of_the_gpu_command_run_at_toy_size(tmp_path):
    subprocess.run(
        ["benchmarks/gpu.sh", "--toy", str(tmp_path)],
        cwd=ROOT,
        check=True,
        timeout=240,
        env=os.environ | {"PYTHON": warm_python()},
    )
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(found) == set(gpu.steps(True, tmp_path)) and not any("error" in step for step in found.values())
    assert found["environment"]["results"][0]["torch"] == torch.__version__
    rows = [row for name in gpu.steps(True, tmp_path) if "step_" in name for row in found[name]["results"]]
    assert [(row["compile"], row["strategy"], row["residual_dtype"]) for row in rows] == [
        (False, "single", "float32"),
        (False, "single", "float32"),
        (True, "single", "float32"),
        (True, "single", "bfloat16"),
        (False, "single", "float32"),
        (True, "single", "bfloat16"),
        (False, "fsdp", "float32"),
    ]
    for row, padding in zip(rows, (0.0, 0.1), strict=False):
        assert row["padding"] == padding and set(row["compared"]) == {"baseline", *ablations.effective(padding)}
        assert row["compared"]["recomputed_products"]["memory_ratio"] > 1
    assert json.loads((tmp_path / "trace" / "trace.json").read_text())["traceEvents"]
    generated = found["generation"]["results"][0]["seconds"]
    assert len(generated) == 4 and generated["rgb_to_caption_256_guided"]["graphs_same_tokens"] is True
    (attention,) = found["decoder_attention"]["results"]
    assert attention["difference"].pop("no_mask") > 0.1 and max(attention["difference"].values()) < 1e-5
    cases = [row["case"] for row in found["tokenizers"]["results"]]
    assert cases == ["tokenize", "decode_vqvae", "decode_divae", "unet_step", "train_vqvae", "train_divae"]
    assert "skipped" in found["tests"]["output"]


def test_failed_and_hanging_steps_are_reported_and_the_time_limits_add_up_to_six_minutes(tmp_path):
    assert sum(limit for limit, _ in gpu.steps(False, tmp_path).values()) < 360
    command = [sys.executable, "-c"]
    failed = gpu.run([*command, 'print(\'{"a": 1}\'); raise SystemExit("no memory")'], 60)
    assert failed["results"] == [{"a": 1}] and failed["error"].startswith("no memory") and failed["status"] == 1
    late = gpu.run(["sh", "-c", "echo begun; sleep 60 & sleep 60"], 0.5)
    assert late["error"] == "stopped after 0.5 seconds\nbegun\n" and late["seconds"] < 10
    assert "tests/train/test_gpu.py" in gpu.marked_tests()

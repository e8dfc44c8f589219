"""The published 21-modality configuration, with other paths, runs on a toy data set of all its modalities."""

from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from benchmarks.toy_shards import ToySamples
from tests.data.dataset_files import write_tar
from tests.train.toy_run import log_lines, run_here

DATA = "cfgs/default/4m/data/cc12m+coyo+c4/main/mix_mod21_all2allmix_rgb2all_capT5bias_C4.yaml"
MAIN = "cfgs/default/4m/models/main/4m-b_mod21_500b.yaml"
SAMPLES = ToySamples([Image.effect_noise((90, 60), 99).convert("RGB")], ["photo", "dog", "number"])


def write_folders(root: Path, folders: list[str], count: int) -> dict[str, list[tuple[str, bytes]]]:
    """Files of a data set; returns them as members of tars."""
    members = {folder: [] for folder in folders}
    for index in range(count):
        for folder, (extension, value) in SAMPLES(index, folders).items():
            path = root / folder / "part" / f"{index:04d}.{extension}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(value)
            members[folder].append((f"{index:04d}.{extension}", value))
    return members


def test_the_published_configuration_runs(tmp_path):
    data = yaml.safe_load(Path(DATA).read_text())
    for name, dataset in data["train"]["datasets"].items():
        if dataset["type"] == "huggingface":
            (tmp_path / "c4.jsonl").write_text("".join(f'{{"text": "words number {i}"}}\n' for i in range(9)))
            dataset["data_path"] = str(tmp_path / "c4.jsonl")
            continue
        folders = dataset["data_path"].split("[")[1].split("]")[0].split(",")
        for folder, members in write_folders(tmp_path / f"{name}_files", folders, 4).items():
            write_tar(tmp_path / name / folder / "shard-00000.tar", members)
        dataset["data_path"] = (
            dataset["data_path"].replace(f"/path/to/{name}/train", str(tmp_path / name)).replace("..00999", "..00000")
        )
    data["val"]["datasets"]["cc12m"]["data_path"] = str(tmp_path / "cc12m_files")
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(data))
    main = yaml.safe_load(Path(MAIN).read_text())
    kwargs = {"dim": 32, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2}
    main |= {
        "data_config": str(tmp_path / "data.yaml"),
        "output_dir": str(tmp_path / "out"),
        "finetune": "",
        "model_kwargs": kwargs,
    }
    (tmp_path / "main.yaml").write_text(yaml.safe_dump(main))
    small = [
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--num_workers",
        "0",
        "--batch_size",
        "4",
        "--num_input_tokens",
        "64",
        "--num_target_tokens",
        "64",
    ]
    output = run_here(tmp_path / "main.yaml", "--dry_run", *small)
    assert "dry run: one step" in output and "data set c4" in output
    short = (
        "--total_tokens -1 --epochs 1 --epoch_size 200 --warmup_tokens -1 --log_interval 1 --fixed_eval_batch_size 4"
    )
    run_here(tmp_path / "main.yaml", *small, *short.split())
    lines = log_lines(tmp_path / "out")
    (evaluation,) = [line["eval"]["cc12m"] for line in lines if "eval" in line]
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, 51)] and set(evaluation) == {
        "train",
        "fixed",
    }
    assert all(np.isfinite(line["loss"]) and line["loss"] > 0 for line in lines if "loss" in line)
    assert len({name for kind in evaluation.values() for name in kind["per_modality"]}) > 5

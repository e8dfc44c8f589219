"""The published 21-modality configuration, with other paths, runs on a toy data set of all its modalities."""

import io
import json
from pathlib import Path

import numpy as np
import yaml

from fourm.data.modality_info import MODALITY_INFO
from tests.data.dataset_files import crop_settings, jpeg, npy, write_tar
from tests.train.toy_run import log_lines, run_in_process

DATA = "cfgs/default/4m/data/cc12m+coyo+c4/main/mix_mod21_all2allmix_rgb2all_capT5bias_C4.yaml"
MAIN = "cfgs/default/4m/models/main/4m-b_mod21_500b.yaml"
CROPS = 3


def content(folder: str, rng: np.random.Generator) -> tuple[str, bytes]:
    """Extension and content of one file."""

    def as_json(value):
        return "json", json.dumps(value).encode()

    box = [0.1, 0.1, 0.9, 0.9]
    polygon = {"points": rng.uniform(0, 224, (6, 2)).tolist(), "token_ids": rng.integers(1024, size=16)}
    person = {
        "box": box,
        "pose": rng.integers(1024, size=8).tolist(),
        "global": [0.5] * 9,
        "shape": [1.0] * 10,
        "camera": [1, 0, 9],
    }
    instances = np.empty(CROPS, object)
    instances[:] = [[polygon] * i for i in range(CROPS)]
    special = {
        "rgb": lambda: ("jpg", jpeg(rng, (256, 300))),
        "crop_settings": lambda: ("npy", npy(crop_settings(rng, 256, 300, CROPS))),
        "caption": lambda: as_json([{"caption": f"a photo of dog number {i}"} for i in range(CROPS)]),
        "det": lambda: as_json({"instances": [{"boxes": box, "class_name": "dog", "score": 0.9}]}),
        "metadata": lambda: as_json({"original_width": 300, "brightness": 80.5, "n_humans": 1, "aesthetic_score": 5}),
        "color_palette": lambda: as_json([{str(n): rng.integers(256, size=(n, 3)).tolist() for n in range(1, 8)}]),
        "human_poses": lambda: as_json([[person] * i for i in range(CROPS)]),
        "sam_instance": lambda: ("npy", npy(instances)),
    }
    if folder in special:
        return special[folder]()
    if folder == "t5_caption":
        file = io.BytesIO()
        np.savez(
            file, emb=rng.normal(size=(CROPS, 77, 4096)).astype(np.float16), mask_valid=np.arange(77) < [[9]] * CROPS
        )
        return "npz", file.getvalue()
    modality = MODALITY_INFO[folder]
    return "npy", npy(rng.integers(modality.vocab_size, size=(CROPS, modality.max_tokens)).astype(np.int16))


def write_folders(root: Path, folders: list[str], count: int) -> dict[str, list[tuple[str, bytes]]]:
    """Files of a data set; returns them as members of tars."""
    members = {folder: [] for folder in folders}
    for index in range(count):
        rng = np.random.default_rng(index)
        for folder in folders:
            extension, value = content(folder, rng)
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
    output = run_in_process(tmp_path / "main.yaml", "--dry_run", *small)
    assert "dry run: one step" in output and "data set c4" in output
    short = "--total_tokens -1 --epochs 1 --epoch_size 48 --warmup_tokens -1 --log_interval 1 --fixed_eval_batch_size 4"
    run_in_process(tmp_path / "main.yaml", *small, *short.split())
    lines = log_lines(tmp_path / "out")
    (evaluation,) = [line["eval"]["cc12m"] for line in lines if "eval" in line]
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, 13)] and set(evaluation) == {
        "train",
        "fixed",
    }
    assert all(np.isfinite(line["loss"]) and line["loss"] > 0 for line in lines if "loss" in line)
    assert len({name for kind in evaluation.values() for name in kind["per_modality"]}) > 5

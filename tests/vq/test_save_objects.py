"""save_vq_tokens.py with tokenizers of people and of segmented instances; 4M and generation read the codes back."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageDraw
from webdataset import TarWriter

from fourm.data.modality_transforms import HumanPoseTransform, SAMInstanceTransform
from fourm.data.transforms.objects import BodyPoseTransform, InstanceMaskTransform
from fourm.generation.instances import decode_instances, place_mask
from fourm.generation.poses import JOINTS, decode_poses, joint_positions, nearest_rotations
from fourm.generation.sequences import SEQUENCES
from fourm.tools.check import main as check
from fourm.utils.errors import DataError, UserError
from tests.data.test_transforms_21 import run
from tests.generation.test_learned_tokenizers import MASKS, POSES
from tests.vq.image_files import SIZE, read_files, write_files, write_shards
from tests.vq.test_save_features import of_features, save

HEIGHT, WIDTH = SIZE
CROPS = np.array([[0, 12, 72, 72, 0], [0, 0, 36, 48, 1]])
OUTLINES = [[[20, 10], [60, 10], [60, 40], [20, 40]], [[70, 20], [95, 20], [95, 70]], [[0, 0], [0.5, 0], [0, 0.5]]]


def person(seed, box, **more):
    rotations = nearest_rotations(np.eye(3) + 0.5 * np.random.default_rng(seed).normal(size=(23, 3, 3)))
    turned = nearest_rotations(np.random.default_rng(seed + 100).normal(size=(3, 3)))
    return {"box": box, "rotations": rotations.tolist(), "global": turned.ravel().tolist(), "shape": [0.5] * 10} | more


PEOPLE = {
    "part0/00000": [person(0, [0.1, 0.1, 0.4, 0.9], camera=[1.0, 2.0, 3.0]), person(1, [0.6, 0.2, 1, 1])],
    "part1/00001": [],
    "part0/00002": [person(2, [0.0, 0.0, 1.0, 1.0])],
}


def write_json(folder, values):
    for key, value in values.items():
        path = folder / f"{key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))


def read_json(folder):
    paths = sorted(path for path in folder.rglob("*.json") if path.name[0] != ".")
    return {path.relative_to(folder).with_suffix("").as_posix(): json.loads(path.read_text()) for path in paths}


def codes_of(model, people):
    return model.tokenize(torch.from_numpy(BodyPoseTransform().preprocess(people))).flatten(1).tolist()


def test_people_are_cropped_mirrored_and_given_the_codes_of_their_poses(tmp_path):
    data = tmp_path / "data"
    write_files(data, "rgb", len(PEOPLE))
    write_json(data / "human_poses", PEOPLE)
    model, arguments = of_features(tmp_path, **POSES, modality="human_poses")
    given = (*arguments, "--num_crops", 4, "--main_modality", "rgb")
    save(*given)
    tokens, crops = read_json(data / "tok_human_poses"), read_files(data / "crop_settings")
    assert tokens.keys() == PEOPLE.keys() == crops.keys() and tokens["part1/00001"] == [[]] * 4
    seen = set()
    for key, in_crops in tokens.items():
        for index, (found, (*crop, flip)) in enumerate(zip(in_crops, crops[key].tolist(), strict=True)):
            plain = [{**one, "pose": [0] * 8} for one in PEOPLE[key]]
            kept = HumanPoseTransform().image_augment(plain, crop, False, SIZE, None, None)
            for one, (original, box) in zip(found, kept, strict=True):
                assert one["box"] == pytest.approx([1 - box[2], box[1], 1 - box[0], box[3]] if flip else box)
                assert one["shape"] == original["shape"] and "rotations" not in one
                assert ("camera" in one) == ("camera" in original and not flip)
                if not flip:
                    assert [one["pose"]] == codes_of(model, [original]) and one["global"] == original["global"]
                seen.add((bool(flip), tuple(one["pose"])))
            # What 4M reads is what generation decodes.
            words = run(HumanPoseTransform(), in_crops, index=index)
            people, unread = SEQUENCES["human_poses"](words.split() if words != "none" else ["none"])
            people, dropped = decode_poses(people, model)
            assert unread == dropped == 0 and [one["pose"] for one in people] == [one["pose"] for one in found]
    assert {flip for flip, _ in seen} == {True, False} and len(seen) > 3
    save(*given, "--dry_run")
    assert read_json(data / "tok_human_poses") == tokens


def test_a_mirrored_person_is_what_a_mirror_shows():
    ((one, rotations),) = BodyPoseTransform().objects(PEOPLE["part0/00002"], np.array([[0, 0, 8, 8, 1]]), (8, 8))[0]
    original = PEOPLE["part0/00002"][0]
    swap = {"left": "right", "right": "left"}
    opposite = [
        JOINTS.index(f"{swap[side]}_{rest}" if (side := name.partition("_")[0]) in swap else name)
        for name in JOINTS
        for rest in [name.partition("_")[2]]
    ]
    expected = joint_positions(original["rotations"], original["global"])[opposite] * (-1, 1, 1)
    np.testing.assert_allclose(joint_positions(rotations, one["global"]), expected, atol=1e-5)


def test_people_of_each_stored_crop_are_taken_as_they_are(tmp_path):
    data, key = tmp_path / "data", "part0/00000"
    write_files(data, "rgb", 1)
    in_crops = [[person(3, [0, 0, 1, 1.2])], [person(4, [0.5, 0, 1, 1]), person(5, [0, 0, 0.5, 1])]]
    write_json(data / "human_poses", {key: in_crops})
    model, arguments = of_features(tmp_path, **POSES, modality="human_poses")
    given = (*arguments, "--num_crops", 2, "--main_modality", "rgb")
    with pytest.raises(DataError, match="the crops of its objects are not known, because it has no crop_settings"):
        save(*given)
    with pytest.raises(DataError, match=r"expected objects of 3 crops \(num_crops\), not 2"):
        save(*given, "--num_crops", 3)
    (data / "crop_settings/part0").mkdir(parents=True)
    np.save(data / f"crop_settings/{key}.npy", CROPS)
    save(*given)
    for found, people in zip(read_json(data / "tok_human_poses")[key], in_crops, strict=True):
        assert [one["pose"] for one in found] == codes_of(model, people)
    assert read_json(data / "tok_human_poses")[key][0][0]["box"] == [0, 0, 1, 1]


def test_masks_fill_the_part_of_their_box_that_lies_in_the_crop(tmp_path):
    data, key = tmp_path / "data", "part0/00000"
    write_shards(data, "rgb", 1, 1)
    for folder, extension, content in (
        ("sam_mask", "json", json.dumps([{"points": outline} for outline in OUTLINES]).encode()),
        ("crop_settings", "npy", as_npy(CROPS)),
    ):
        (data / folder).mkdir()
        with TarWriter(str(data / folder / "shard-00000.tar")) as tar:
            tar.write({"__key__": key, extension: content})
    model, arguments = of_features(tmp_path, **MASKS, modality="sam_mask")
    save(*arguments, "--num_crops", 2, "--main_modality", "rgb")
    with tarfile.open(data / "tok_sam_instance/shard-00000.tar") as tar:
        (member,) = tar.getmembers()
        instances = json.load(tar.extractfile(member))
    assert member.name == f"{key}.json" and [len(in_crop) for in_crop in instances] == [2, 1]
    transform = InstanceMaskTransform()
    for index, (top, left, height, width, flip) in enumerate(CROPS.tolist()):
        described = transform.objects(OUTLINES, CROPS[index : index + 1], SIZE)[0]
        masks = torch.from_numpy(np.stack([mask for _, mask in described]))
        assert [one["token_ids"] for one in instances[index]] == model.tokenize(masks).flatten(1).tolist()
        # A mask in the box that 4M reads is the outline in the crop.
        words = run(SAMInstanceTransform(num_points=200), instances, index=index).split()
        points, unread = SEQUENCES["sam_instance"](words)
        assert unread == 0
        found = {tuple(polygon["codes"]): polygon["box"] for point in points for polygon in point["polygons"]}
        assert len(found) == len(described)
        for outline, one, mask in zip(OUTLINES, instances[index], masks, strict=False):
            drawn = Image.new("L", (WIDTH * 4, HEIGHT * 4))
            ImageDraw.Draw(drawn).polygon([(4 * x, 4 * y) for x, y in outline], fill=1)
            crop = drawn.crop((4 * left, 4 * top, 4 * (left + width), 4 * (top + height))).resize((224, 224))
            true = np.asarray(crop)[:, :: -1 if flip else 1] > 0
            placed = place_mask(mask[0], found[tuple(one["token_ids"])], (224, 224))
            assert (true & placed).sum() / (true | placed).sum() > 0.93
        assert all("mask" in polygon for point in decode_instances(points, model)[0] for polygon in point["polygons"])


def as_npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_outlines_follow_the_size_of_the_image_in_their_file():
    double = [[[2 * x, 2 * y] for x, y in outline] for outline in OUTLINES]
    described = {"image": {"width": 2 * WIDTH, "height": 2 * HEIGHT}, "annotations": [{"points": p} for p in double]}
    transform = InstanceMaskTransform()
    for one, other in zip(
        transform.objects(OUTLINES, CROPS, SIZE), transform.objects(described, CROPS, SIZE), strict=True
    ):
        for (first, mask), (second, same) in zip(one, other, strict=True):
            np.testing.assert_allclose(first["points"], second["points"])
            np.testing.assert_array_equal(mask, same)
    assert transform.objects([], CROPS, SIZE) == [[], []]


def test_what_cannot_become_people_or_instances_is_one_sentence(tmp_path):
    data = tmp_path / "data"
    write_files(data, "rgb", 1)
    write_json(data / "human_poses", {"part0/00000": np.eye(3)[None].repeat(23, 0).tolist()})
    _, arguments = of_features(tmp_path, **POSES, modality="human_poses")
    with pytest.raises(UserError, match="'main_modality' is not set: name the folder of the pictures"):
        save(*arguments)
    given = (*arguments, "--num_crops", 1, "--main_modality", "rgb")
    with pytest.raises(DataError, match=r"human_poses/part0.*expected a person with"):
        save(*given)
    write_json(data / "human_poses", {"part0/00000": [{"box": [0, 0, 1, 1], "pose": [1] * 8}]})
    with pytest.raises(DataError, match="expected a person with 'rotations'"):
        save(*given)
    _, arguments = of_features(tmp_path, **POSES | {"num_codebooks": 4}, modality="human_poses")
    with pytest.raises(UserError, match="has 4 codes below 1024 for each .* a 4M model reads 8 codes below 1024"):
        save(*given)


def test_a_data_yaml_that_names_the_folders_reads_them(tmp_path, capsys):
    data = tmp_path / "data"
    write_files(data, "rgb", len(PEOPLE))
    write_json(data / "human_poses", PEOPLE)
    write_json(data / "sam_mask", {key: OUTLINES if people else [] for key, people in PEOPLE.items()})
    for options, modality in ((POSES, "human_poses"), (MASKS, "sam_mask")):
        _, arguments = of_features(tmp_path, **options, modality=modality)
        save(*arguments, "--num_crops", 3, "--main_modality", "rgb")
    names = "rgb@32-human_poses-sam_instance"
    dataset = {"in_domains": names, "out_domains": names[7:], "data_path": str(data), "input_alphas": 1.0}
    content = {
        "modalities": {
            "rgb@32": {"type": "img", "input_size": 32, "patch_size": 16, "num_channels": 3, "path": "rgb"},
            "human_poses": {"path": "tok_human_poses"},
            "sam_instance": {"path": "tok_sam_instance"},
        },
        "train": {"datasets": {"toy": dataset | {"target_alphas": 1.0, "main_augment_domain": "rgb@32"}}},
    }
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
    assert check([f"{tmp_path}/data.yaml", "--json", "--num_workers", "0", "--num_input_tokens", "64"]) == 0
    printed = capsys.readouterr().out
    (report,) = json.loads(printed[printed.index("[") :])
    assert report["samples_read"] == len(PEOPLE) and report["bad_samples"] == 0 and not report["problems"]

"""README_TOKENIZATION.md: what it says about images is done, in its order, on a small data set."""

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from fourm.data import resolve_modalities
from fourm.vq import TOKENIZERS, load_tokenizer
from tests.vq.image_files import write_files, write_shards
from tests.warm_python import warm_python

REPOSITORY = Path(__file__).parents[2]
IMAGES = (REPOSITORY / "README_TOKENIZATION.md").read_text().split("## Images")[1].replace(" \\\n    ", " ")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", IMAGES, re.M | re.S)

# Nothing is downloaded: a small network of the same kind, with weights of its own.
DINOV2 = "--vocab_size 8192 --patch_size 14 --backbone vit_base_patch14_dinov2.lvd142m"
SMALL = "--vocab_size 64 --patch_size 16 --input_size 64 --backbone test_vit --backbone_weights vit.safetensors"
TRAINED = (
    "--encoder_type vit_s_enc --decoder_type vit_s_dec --patch_size 8 --input_size_min 64 --input_size_max 64 "
    "--epochs 100 --batch_size 32 --warmup_epochs 5"
)
TINY = TRAINED.replace("vit_s_enc", "vit/B_1-Wi_32-H_2").replace("vit_s_dec", "vit/B_1-Wi_32-H_2").replace("100", "2")
TINY = TINY.replace("size 32", "size 4").replace("epochs 5", "epochs 0") + " --device cpu --num_workers 1"


@pytest.mark.slow
def test_what_the_readme_says_can_be_done(tmp_path):
    for modality in ("rgb", "depth", "semseg"):
        write_shards(tmp_path / "my_shards", modality, 12, 6)
        write_files(tmp_path / "my_data", modality, 12)
    for script in ("save_vq_tokens.py", "run_training_vqvae.py"):
        (tmp_path / script).symlink_to(REPOSITORY / script)
    save_file(timm.create_model("test_vit", img_size=64).state_dict(), tmp_path / "vit.safetensors")
    assert sum(DINOV2 in code for _, code in BLOCKS) == sum(TRAINED in code for _, code in BLOCKS) == 1
    path = f"{Path(warm_python()).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}"}
    output = ""
    for language, code in BLOCKS:
        if language == "bash":
            result = subprocess.run(
                ["bash", "-ec", code.replace(DINOV2, SMALL).replace(TRAINED, TINY)],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
            )
            assert result.returncode == 0, f"{code}\n{result.stderr}"
            output += result.stdout
        elif language == "python" and code.startswith("# "):
            (tmp_path / code.split("\n")[0].removeprefix("# ")).write_text(code)
        elif language == "python":  # the interface, whose tokenizer is only fitted further below
            interface = code
        elif language == "yaml":
            declared = resolve_modalities(*2 * [yaml.safe_load(code)["modalities"]])
    assert output.count("12 images would be tokenized") == 1
    assert output.count("12 images were tokenized") == 6
    decoded = subprocess.run(
        [warm_python(), "decode_learned.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert decoded.stdout == "(1, 3, 64, 64)\n", decoded.stderr
    assert "(6, 10, 64) (images, crops, tokens), " in output
    assert Image.open(tmp_path / "decoded.png").size == (10 * 64, 64)
    for name, modality in declared.items():
        tokenizer = load_tokenizer(tmp_path / "tokenizers" / name.removeprefix("tok_").split("@")[0])
        assert (tokenizer.vocab_size, tokenizer.patch_size) == (modality["vocab_size"], modality["patch_size"])
        assert (tmp_path / "my_shards" / name).is_dir()

    names = {"images": torch.rand(2, 3, 64, 64)}
    exec(interface.replace("tokenizers/rgb", str(tmp_path / "tokenizers" / "rgb")), names)
    assert names["images"].shape == (2, 3, 64, 64)

    own = {"__name__": "my_tokenizer"}
    exec((tmp_path / "my_tokenizer.py").read_text(), own)
    try:
        grey = load_tokenizer(tmp_path / "tokenizers" / "mean_grey")
        decoded = grey.decode_tokens(grey.tokenize(torch.full((1, 3, 16, 24), 0.5)))
        assert decoded.shape == (1, 3, 16, 24)
        assert np.allclose(decoded, 0.5, atol=1 / 15)
    finally:
        del TOKENIZERS["mean_grey"]

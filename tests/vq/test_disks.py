"""Full and read-only disks, for every command that writes: one sentence, nothing half-written, and nothing lost."""

import contextlib
import resource
import subprocess

import pytest
import torch

from fourm.generation.script import main as generate
from fourm.models import FM
from fourm.tools.pack import main as pack
from fourm.tools.preview.command import main as preview
from fourm.train.export import main as export
from fourm.utils.errors import UserError
from fourm.utils.tokenizer.train_wordpiece import main as train_words
from fourm.vq.fit_codebook import main as fit
from fourm.vq.save_tokens import main as save_tokens
from tests.generation.test_sampler import write_run
from tests.train import toy_run
from tests.train.checkpoint_files import write_checkpoint
from tests.vq.image_files import write_files, write_shards

WRITERS = ["fit", "tokens of files", "tokens of shards", "pack", "unpack", "export", "preview", "generation", "words"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("inputs"))
    write_files(folder / "files", "rgb", 4)
    write_shards(folder / "shards", "rgb", 4, 2)
    toy_run.write_run(folder / "toys")
    write_checkpoint(folder / "checkpoints", 1, FM.from_pretrained(str(folder / "run")))
    (folder / "text.txt").write_text("a red cup on the table, a duck, and a green box\n" * 20)
    torch.manual_seed(0)
    fit([str(part) for part in _fit(folder, folder / "codebook")])
    return folder


def _fit(inputs, out):
    options = ("--vocab_size", 64, "--input_size", 32, "--epochs", 1, "--num_workers", 0, "--device", "cpu")
    return ["--data_root", inputs / "files", "--modality", "rgb", "--output", out, *options]


def _tokens(inputs, kind, out):
    # Tokens go beside the images.
    root = out / kind
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "rgb").exists():
        (root / "rgb").symlink_to(inputs / kind / "rgb")
    options = ("--num_workers", 0, "--device", "cpu", "--output_modality", "tok")
    return ["--tokenizer", inputs / "codebook", "--data_root", root, "--modality", "rgb", *options]


def run(writer, inputs, out):
    """One of the commands, with all that it writes below ``out``."""
    data = inputs / "toys" / "data.yaml"
    command, arguments = {
        "fit": lambda: (fit, _fit(inputs, out / "codebook")),
        "tokens of files": lambda: (save_tokens, _tokens(inputs, "files", out)),
        "tokens of shards": lambda: (save_tokens, _tokens(inputs, "shards", out)),
        "pack": lambda: (pack, ["shards", inputs / "files", out / "packed"]),
        "unpack": lambda: (pack, ["folders", inputs / "shards", out / "unpacked"]),
        "export": lambda: (export, [inputs / "checkpoints" / "step-00000001", out / "exported"]),
        "preview": lambda: (
            preview,
            [
                data,
                "--out",
                out / "page.html",
                "--samples",
                1,
                "--draws",
                5,
                "--text_tokenizer_path",
                inputs / "toys" / "words.json",
            ],
        ),
        "generation": lambda: (
            generate,
            [
                "--model",
                inputs / "run",
                "--tokenizers",
                inputs / "tokenizers",
                "--device",
                "cpu",
                "--cond_domains",
                "rgb",
                "--data",
                inputs / "photo.png",
                "--target_domains",
                "depth",
                "--tokens_per_target",
                4,
                "--output_dir",
                out / "results",
            ],
        ),
        "words": lambda: (
            train_words,
            ["--input", inputs / "text.txt", "--output", out / "words.json", "--vocab_size", 5100],
        ),
    }[writer]()
    command([str(part) for part in arguments])


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(above.is_symlink() for above in path.parents)
    }


@contextlib.contextmanager
def files_up_to(size):
    """Files cannot get larger, as on a full disk; Python ignores the signal that comes with it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def read_only(folder):
    """Also for the administrator, who may write to everything else."""
    mounting = [["mount", "--bind", str(folder), str(folder)], ["mount", "-o", "remount,ro,bind", str(folder)]]
    if subprocess.run(mounting[0], capture_output=True).returncode:
        pytest.skip("only root may mount a disk")
    try:
        subprocess.run(mounting[1], check=True)
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk(inputs, tmp_path, writer, capfd):
    # The first file, and of those that come in pairs the second one.
    for size in (40, 5000) if writer == "export" else (40,):
        with (
            files_up_to(size),
            pytest.raises(UserError, match=f"{tmp_path}.* cannot be written: the file is larger than"),
        ):
            run(writer, inputs, tmp_path)
        assert not [name for name, content in tree(tmp_path).items() if content], "half-written, or left behind"
    run(writer, inputs, tmp_path)
    before = tree(tmp_path)
    assert before
    if writer in ("fit", "export", "preview", "words"):  # the others keep what they find finished
        with files_up_to(40), pytest.raises(UserError, match="cannot be written: the file is larger than"):
            run(writer, inputs, tmp_path)
        assert tree(tmp_path) == before


@pytest.mark.parametrize("writer", WRITERS)
def test_a_read_only_disk(inputs, tmp_path, writer, capfd):
    for kind in ("files", "shards"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "rgb").symlink_to(inputs / kind / "rgb")
    with read_only(tmp_path), pytest.raises(UserError, match=f"{tmp_path}.* (cannot be written|[Rr]ead-only)"):
        run(writer, inputs, tmp_path)
    assert not tree(tmp_path)

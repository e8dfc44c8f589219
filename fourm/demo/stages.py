"""The demo's stages, in order; what is finished is kept, so the demo may be interrupted anywhere and started again.

``OUT/demo.json`` holds the options that decide what the data are, the seconds that each stage took, and the step at which
training was stopped on purpose.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

import fourm
from fourm.demo import generated, network, report, training
from fourm.demo.annotations import CLASSES
from fourm.demo.figures import loss_curves, sample_sheet
from fourm.demo.render import EXTENSIONS, Unit, render_all, units
from fourm.utils.config import load_yaml, resolve_options
from fourm.utils.errors import UserError, did_you_mean
from fourm.utils.files import atomic_path
from fourm.utils.options import option, parse_options
from fourm.utils.paths import AnyPath
from fourm.utils.tokenizer.train_wordpiece import TrainOptions, train_vocabulary
from fourm.vq.fit_codebook import FitOptions, fit_codebook
from fourm.vq.save_tokens import SaveTokensOptions, save_tokens

ROOT = Path(fourm.__file__).parents[1]  # of the repository: the training command and the configs lie there
SHARD_SIZE, FOLDER_SIZE = 250, 100


@dataclass(frozen=True)
class DemoOptions:
    """The command line of the demo."""

    out: AnyPath = option("folder for everything that the demo makes", "demo_run")
    train_scenes: int = option("scenes to train on", 2000, at_least=1, at_most=10**7)
    val_scenes: int = option("scenes to validate on", 200, at_least=1, at_most=10**7)
    size: int = option("side of the rendered pictures in pixels", 128, at_least=1, at_most=10_000)
    seed: int = option("seed of the scenes and codebooks", 0, at_least=0, at_most=2**62)
    workers: int = option("processes that render and read", 2, at_least=1, at_most=512)
    config: AnyPath = option("training configuration", "cfgs/demo/main.yaml")
    generated_scenes: int = option("validation scenes that are generated and measured", 100, at_least=1, at_most=10**7)
    stages: str = option(
        "which stages to run, joined by commas", "render,vocabulary,codebooks,tokenize,train,generate,report"
    )

    def __post_init__(self) -> None:
        resolve_options(self)
        for stage in self.stages.split(","):
            if stage not in STAGES:
                raise UserError(f"unknown stage '{stage}'{did_you_mean(stage, STAGES)}; there are {', '.join(STAGES)}")


class Demo:
    """The paths and the record of one demo folder."""

    def __init__(self, options: DemoOptions):
        self.options = options
        self.out = Path(options.out).resolve()
        self.data, self.codebooks, self.run = (self.out / name for name in ("data", "codebooks", "training"))
        self.generation = self.out / "generated"
        self.vocabulary, self._record = self.out / "vocabulary.json", self.out / "demo.json"
        given = {key: getattr(options, key) for key in ("train_scenes", "val_scenes", "size", "seed", "config")}
        self.record: dict[str, Any] = {"options": given, "seconds": {}, "stopped_at": None}
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"out: {self.out} is a file: give the path of a folder")
        if not self._record.exists():
            if self.out.exists() and any(self.out.iterdir()):
                raise UserError(f"out: {self.out} holds what the demo did not make: choose a new folder")
        else:
            self.record = self._read_record()
            for key, value in self.record["options"].items():
                if given.get(key) != value:
                    raise UserError(
                        f"{self.out} was made with {key} {value}, not {given.get(key)}: choose another --out, or remove it"
                    )

    def _read_record(self) -> dict[str, Any]:
        try:
            record = json.loads(self._record.read_bytes())
            if {"options": dict, "seconds": dict}.items() <= {
                key: type(value) for key, value in record.items()
            }.items():
                return {"stopped_at": None, **record}
        except (ValueError, AttributeError, RecursionError):
            pass
        raise UserError(f"{self._record} is damaged, or not the demo's: choose another --out, or remove the folder")

    def save(self) -> None:
        with atomic_path(self._record) as path:
            path.write_text(json.dumps(self.record, indent=2) + "\n")

    def units(self, split: str) -> list[Unit]:
        count, size = {"train": (self.options.train_scenes, SHARD_SIZE), "val": (self.options.val_scenes, FOLDER_SIZE)}[
            split
        ]
        return units(self.data, split, count, size)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The training configuration."""
        return load_yaml(self._file(self.options.config))

    @cached_property
    def data_config(self) -> dict[str, Any]:
        """The data configuration, with the paths of this folder."""
        config = load_yaml(self._file(self.config["data_config"]))
        (train,), (val,) = config["train"]["datasets"].values(), config["val"]["datasets"].values()
        folders = train["data_path"].split("[")[1].split("]")[0]
        last = len(self.units("train")) - 1
        train["data_path"] = f"{self.data}/train/[{folders}]/shard-{{00000..{last:05d}}}.tar"
        val["data_path"] = f"{self.data}/val"
        return config

    @property
    def tokenized(self) -> dict[str, dict[str, Any]]:
        """Modality of images → declaration of its tokens."""
        declared = self.data_config["modalities"].items()
        return {name.split("@")[0].removeprefix("tok_"): d | {"name": name} for name, d in declared if "tok_" in name}

    @property
    def generated_scenes(self) -> int:
        return min(self.options.generated_scenes, self.options.val_scenes)

    @staticmethod
    def _file(name: str) -> Path:
        return Path(name) if Path(name).exists() else ROOT / name


def render(demo: Demo) -> None:
    """Scenes → shards for training, folders for validation."""
    options = demo.options
    render_all(demo.units("train") + demo.units("val"), options.size, options.seed, options.workers)
    first = demo.units("val")[0]
    keys = [f"{index:06d}" for index in range(first.start, min(first.stop, first.start + 6))]
    samples = [{m: first.path(m) / f"{key}.{extension}" for m, extension in EXTENSIONS.items()} for key in keys]
    sample_sheet(samples, CLASSES, demo.out / "samples.png")
    print(f"samples of the data: {demo.out / 'samples.png'}")


def vocabulary(demo: Demo) -> None:
    """A text vocabulary of what the captions need: the shipped one has 30 000 words to choose from, for minutes more."""
    if not demo.vocabulary.exists():
        size = demo.data_config["modalities"]["caption"]["vocab_size"]
        captions = str(demo.data / "train" / "caption")
        train_vocabulary(TrainOptions(input=captions, output=str(demo.vocabulary), vocab_size=size))


def codebooks(demo: Demo) -> None:
    """A codebook per modality of images, and one of what a network sees in them."""
    for modality, declared in demo.tokenized.items():
        if (demo.codebooks / modality).exists():
            continue
        images: dict[str, Any] = {"modality": modality}
        if modality == network.MODALITY:
            weights = demo.out / f"{modality}.safetensors"
            network.write_weights(weights)
            images = {"modality": "rgb", "backbone": network.BACKBONE, "backbone_weights": str(weights)}
        _, fitted = fit_codebook(
            FitOptions(
                **images, data_root=str(demo.data / "train"), output=str(demo.codebooks / modality),
                vocab_size=declared["vocab_size"], patch_size=declared["patch_size"], input_size=declared["input_size"],
                one_hot_classes=len(CLASSES) if modality == "semseg" else None, num_images=1000, num_crops=1,
                num_patches=20_000, seed=demo.options.seed, num_workers=demo.options.workers,
            )
        )  # fmt: skip
        print(
            f"codebook of {modality}: {fitted.used_codes} of {declared['vocab_size']} codes used, perplexity "
            f"{fitted.perplexity:.0f}, {1 - fitted.error:.0%} of the variance explained"
        )


def tokenize(demo: Demo) -> None:
    """Every image → token ids, once for its centre crop: captions that say left and right do not follow random ones."""
    for split in ("train", "val"):
        for modality, declared in demo.tokenized.items():
            save_tokens(
                SaveTokensOptions(
                    tokenizer=str(demo.codebooks / modality), data_root=str(demo.data / split),
                    output_modality=declared["name"], num_crops=1, seed=demo.options.seed,
                    num_workers=demo.options.workers,
                )
            )  # fmt: skip


def train(demo: Demo) -> None:
    """The training command, stopped in the middle and resumed."""
    if (demo.run / "model.safetensors").exists():
        return
    data_config = demo.out / "data.yaml"
    with atomic_path(data_config) as path:
        path.write_text(yaml.safe_dump(demo.data_config, sort_keys=False))
    command = training.command(
        demo._file(demo.options.config).resolve(), data_config=data_config, text_tokenizer_path=demo.vocabulary,
        output_dir=demo.run,
    )  # fmt: skip
    config = demo.config
    steps = config["epochs"] * (config["epoch_size"] // config["batch_size"])
    # Not at the end of an epoch: that a run continues exactly is worth showing in the middle of one.
    stop_at = int(0.45 * steps) if demo.record["stopped_at"] is None else None
    stopped = training.train(command, ROOT, demo.run, stop_at)
    if stopped is not None:
        demo.record["stopped_at"] = stopped
        demo.save()
        training.train(command, ROOT, demo.run, None)


def generate(demo: Demo) -> None:
    """Scenes that the model has never seen, from RGB alone; a photograph; pictures from words."""
    beside = demo._file(str(Path(demo.options.config).with_name("generation.yaml")))
    base = load_yaml(beside if beside.exists() else ROOT / "cfgs/demo/generation.yaml")
    own = {"model": str(demo.run), "tokenizers": str(demo.codebooks), "text_tokenizer": str(demo.vocabulary)}
    generated.generate_all(base | own, demo.data, demo.generation, demo.generated_scenes)


def summarize(demo: Demo) -> int:
    """The tables and the curves.

    Returns:
        The demo's exit status: 0 if the model learned what it must.
    """
    trained, evaluations = report.read_log(demo.run)
    lines = report.table(evaluations[-1]["per_modality"], report.entropies(demo.run))
    loss_curves(trained, evaluations, lines, demo.record["stopped_at"], demo.out / "curves.png")
    seconds, scores = demo.record["seconds"], generated.read_scores(demo.generation)
    facts = {"steps": trained[-1]["step"], "stopped_at": demo.record["stopped_at"], "seconds": seconds}
    facts["generated"] = [dataclasses.asdict(score) for score in scores]
    ok = report.passed(lines) and generated.passed(scores)
    verdict = "PASSED" if ok else "FAILED"
    text = f"""
{report.markdown(lines)}

Loss and entropy in nats per token, on the {demo.options.val_scenes} validation scenes with fixed token budgets. The entropy is
the best that a model could do which only knows how often each token occurs.

{generated.markdown(scores)}

What the model generates from the RGB of {demo.generated_scenes} validation scenes, against the truth. Depth is compared after fitting scale
and shift. Tokens of the truth: what the codebooks can show at best. Guess: of every pixel the mean, or commonest, of 250
training scenes; boxes and caption of another scene.

{verdict}. To pass, depth, normals, segmentation, captions and boxes must have a loss clearly below the entropy (at most {report.CLEAR} of
it), and what is generated of depth, normals, segmentation and objects in captions must be better than the guess.
Trained for {facts["steps"]} steps; stopped on purpose at step {facts["stopped_at"]} and resumed. Seconds: {_listed(seconds)}.
"""
    report.write(demo.out, lines, facts, text)
    print(text)
    pictures = {"curves": "curves.png", "data": "samples.png", "from RGB": "generated/sheet.png",
                "from words": "generated/words/sheet.png"}  # fmt: skip
    for what, name in {"report": "report.md", **pictures}.items():
        print(f"{what + ':':12}{demo.out / name}")
    return 0 if ok else 1


STAGES: dict[str, Callable[[Demo], int | None]] = {
    "render": render, "vocabulary": vocabulary, "codebooks": codebooks, "tokenize": tokenize, "train": train,
    "generate": generate, "report": summarize,
}  # fmt: skip


def parse(argv: list[str] | None = None) -> DemoOptions:
    return parse_options(DemoOptions, argv, "Render a small multimodal data set, train a 4M model on it, report.")


def run(options: DemoOptions) -> int:
    """Run the stages; returns the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that children are stopped too
    demo = Demo(options)
    if network.MODALITY in demo.tokenized:
        network.weights_file()  # to be missed now, not after minutes of rendering
    demo.save()
    status = 0
    for name in STAGES:
        if name in options.stages.split(","):
            print(f"── {name}", flush=True)
            start = time.monotonic()
            try:
                status = STAGES[name](demo) or 0
            except KeyboardInterrupt:
                print(f"\ninterrupted during {name}; run the same command again to go on")
                return 128 + signal.SIGINT
            finally:
                seconds = demo.record["seconds"]
                seconds[name] = round(seconds.get(name, 0) + time.monotonic() - start, 1)
                demo.save()
    return status


def _listed(seconds: dict[str, float]) -> str:
    total = sum(seconds.values())
    return ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()) + f"; together {total:.0f}"

"""Run the stages of the demo in order. Finished work is kept, so that the demo may be interrupted and restarted.

``OUT/demo.json`` records the options that determine the data, the seconds that each stage took, and the step at which
the training was stopped on purpose.
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

from fourm.demo import generated, network, report, training
from fourm.demo.figures import loss_curves, sample_sheet
from fourm.demo.render import EXTENSIONS, Unit, render_all, units
from fourm.demo.scene import CLASSES
from fourm.demo.tokenizers import RECIPE, make_tokenizer
from fourm.utils.config import load_yaml, resolve_options
from fourm.utils.errors import UserError, did_you_mean
from fourm.utils.files import atomic_path
from fourm.utils.options import option, parse_options
from fourm.utils.paths import AnyPath, shipped
from fourm.utils.tokenizer.train_wordpiece import TrainOptions, train_vocabulary
from fourm.vq.save_tokens import SaveTokensOptions, save_tokens

SHARD_SIZE, FOLDER_SIZE = 250, 100
_OF_THE_DATA = ("train_scenes", "val_scenes", "size", "seed", "train_tokenizers", "config")


@dataclass(frozen=True)
class DemoOptions:
    """The command line of the demo."""

    out: AnyPath = option("folder for all files of the demo", "demo_run")
    train_scenes: int = option("number of training scenes", 2000, at_least=1, at_most=10**7)
    val_scenes: int = option("number of validation scenes", 200, at_least=1, at_most=10**7)
    size: int = option("side of the rendered pictures in pixels", 128, at_least=1, at_most=10_000)
    seed: int = option("seed of the scenes and tokenizers", 0, at_least=0, at_most=2**62)
    workers: int = option("number of processes that render and read data", 2, at_least=1, at_most=512)
    train_tokenizers: int = option(
        "train the learned tokenizers for this number of epochs; 0 = use those that come with the package",
        0,
        at_least=0,
        at_most=10**4,
    )
    config: AnyPath = option("training configuration", "cfgs/demo/main.yaml")
    generated_scenes: int = option(
        "number of validation scenes to generate and measure", 100, at_least=1, at_most=10**7
    )
    stages: str = option(
        "stages to run, separated by commas", "render,vocabulary,tokenizers,tokenize,train,generate,report"
    )

    def __post_init__(self) -> None:
        resolve_options(self)
        for stage in self.stages.split(","):
            if stage not in STAGES:
                raise UserError(
                    f"unknown stage '{stage}'{did_you_mean(stage, STAGES)}; the stages are {', '.join(STAGES)}"
                )


class Demo:
    """The paths and the record of a demo folder."""

    def __init__(self, options: DemoOptions):
        self.options = options
        self.out = Path(options.out).resolve()
        self.data = self.out / "data"
        self.tokenizers = self.out / "tokenizers"
        self.run = self.out / "training"
        self.generation = self.out / "generated"
        self.vocabulary = self.out / "vocabulary.json"
        self._record_file = self.out / "demo.json"
        given = {key: getattr(options, key) for key in _OF_THE_DATA}
        self.record: dict[str, Any] = {"options": given, "seconds": {}, "stopped_at": None}
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"out: {self.out} is a file: give the path of a folder")
        if not self._record_file.exists():
            if self.out.exists() and any(self.out.iterdir()):
                raise UserError(f"out: {self.out} contains files that the demo did not write: choose a new folder")
        else:
            self.record = self._read_record()
            for key, value in self.record["options"].items():
                if given.get(key) != value:
                    raise UserError(
                        f"{self.out} was made with {key} {value}, not {given.get(key)}: choose another --out, or "
                        "remove the folder"
                    )

    def _read_record(self) -> dict[str, Any]:
        try:
            record = json.loads(self._record_file.read_bytes())
            if type(record["options"]) is dict and type(record["seconds"]) is dict:
                return {"stopped_at": None, **record}
        except (ValueError, TypeError, KeyError, IndexError, RecursionError):
            pass
        raise UserError(
            f"{self._record_file} is damaged, or was not written by the demo: choose another --out, or remove the "
            "folder"
        )

    def save(self) -> None:
        with atomic_path(self._record_file) as path:
            path.write_text(json.dumps(self.record, indent=2) + "\n")

    def units(self, split: str) -> list[Unit]:
        if split == "train":
            return units(self.data, split, self.options.train_scenes, SHARD_SIZE)
        return units(self.data, split, self.options.val_scenes, FOLDER_SIZE)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The training configuration."""
        return load_yaml(self._file(self.options.config))

    @cached_property
    def data_config(self) -> dict[str, Any]:
        """The data configuration with the paths of this demo folder."""
        config = load_yaml(self._file(self.config["data_config"]))
        (train,), (val,) = config["train"]["datasets"].values(), config["val"]["datasets"].values()
        folders = train["data_path"].split("[")[1].split("]")[0]
        last = len(self.units("train")) - 1
        train["data_path"] = f"{self.data}/train/[{folders}]/shard-{{00000..{last:05d}}}.tar"
        val["data_path"] = f"{self.data}/val"
        return config

    @property
    def tokenized(self) -> dict[str, dict[str, Any]]:
        """The image modalities that are tokenized: name → declaration of the tokens."""
        declared = self.data_config["modalities"].items()
        return {name.split("@")[0].removeprefix("tok_"): d | {"name": name} for name, d in declared if "tok_" in name}

    @property
    def generated_scenes(self) -> int:
        return min(self.options.generated_scenes, self.options.val_scenes)

    @staticmethod
    def _file(name: str) -> Path:
        return Path(shipped(name))


def render(demo: Demo) -> None:
    """Render the scenes, as shards for training and folders for validation."""
    options = demo.options
    render_all(demo.units("train") + demo.units("val"), options.size, options.seed, options.workers)
    first = demo.units("val")[0]
    keys = [f"{index:06d}" for index in range(first.start, min(first.stop, first.start + 6))]
    samples = [{m: first.path(m) / f"{key}.{extension}" for m, extension in EXTENSIONS.items()} for key in keys]
    sample_sheet(samples, CLASSES, demo.out / "samples.png")
    print(f"samples of the data: {demo.out / 'samples.png'}")


def vocabulary(demo: Demo) -> None:
    """Train a small vocabulary on the captions; the shipped one of 30 000 tokens would take minutes more to learn."""
    if not demo.vocabulary.exists():
        size = demo.data_config["modalities"]["caption"]["vocab_size"]
        captions = str(demo.data / "train" / "caption")
        train_vocabulary(TrainOptions(input=captions, output=str(demo.vocabulary), vocab_size=size))


def tokenizers(demo: Demo) -> None:
    """Make a tokenizer for each image modality, and one for the features that a network computes from RGB."""
    options = demo.options
    for modality, declared in demo.tokenized.items():
        made = make_tokenizer(
            modality,
            declared,
            demo.data,
            demo.tokenizers / modality,
            demo._file(RECIPE),
            options.train_tokenizers,
            options.seed,
            options.workers,
        )
        print(f"tokenizer of {modality}: {made}")


def tokenize(demo: Demo) -> None:
    """Tokenize the centre crop of each image; random crops could contradict captions that say left and right."""
    for split in ("train", "val"):
        for modality, declared in demo.tokenized.items():
            save_tokens(
                SaveTokensOptions(
                    tokenizer=str(demo.tokenizers / modality),
                    data_root=str(demo.data / split),
                    output_modality=declared["name"],
                    num_crops=1,
                    seed=demo.options.seed,
                    num_workers=demo.options.workers,
                )
            )


def train(demo: Demo) -> None:
    """Run the training command, stop it halfway and resume it."""
    if (demo.run / "model.safetensors").exists():
        return
    data_config = demo.out / "data.yaml"
    with atomic_path(data_config) as path:
        path.write_text(yaml.safe_dump(demo.data_config, sort_keys=False))
    command = training.command(
        "train",
        demo._file(demo.options.config).resolve(),
        data_config=data_config,
        text_tokenizer_path=demo.vocabulary,
        output_dir=demo.run,
    )
    config = demo.config
    steps = config["epochs"] * (config["epoch_size"] // config["batch_size"])
    # Not at the end of an epoch, to demonstrate that a run continues exactly from the middle of one.
    stop_at = int(0.45 * steps) if demo.record["stopped_at"] is None else None
    stopped = training.train(command, demo.run, stop_at)
    if stopped is not None:
        demo.record["stopped_at"] = stopped
        demo.save()
        training.train(command, demo.run)


def generate(demo: Demo) -> None:
    """Generate from the RGB of unseen scenes, from a photograph, and from words."""
    config = demo._file(str(Path(demo.options.config).with_name("generation.yaml")))
    base = load_yaml(config if config.exists() else shipped("cfgs/demo/generation.yaml"))
    paths = {"model": str(demo.run), "tokenizers": str(demo.tokenizers), "text_tokenizer": str(demo.vocabulary)}
    generated.generate_all(base | paths, demo.data, demo.generation, demo.generated_scenes)


def summarize(demo: Demo) -> int:
    """Write the tables and the curves.

    Returns:
        The demo's exit status, which is 0 if the model passed.
    """
    training_log, evaluations = report.read_log(demo.run)
    results = report.table(evaluations[-1]["per_modality"], report.entropies(demo.run))
    loss_curves(training_log, evaluations, results, demo.record["stopped_at"], demo.out / "curves.png")
    seconds, scores = demo.record["seconds"], generated.read_scores(demo.generation)
    facts = {"steps": training_log[-1]["step"], "stopped_at": demo.record["stopped_at"], "seconds": seconds}
    facts["generated"] = [dataclasses.asdict(score) for score in scores]
    passed = report.passed(results) and generated.passed(scores)
    text = f"""
{report.markdown(results)}

Loss and entropy are in nats per token, on the {demo.options.val_scenes} validation scenes with fixed token budgets. The
entropy is the lowest loss of any model that knows only how often each token occurs.

{generated.markdown(scores)}

This table compares what the model generates from the RGB of {demo.generated_scenes} validation scenes with the truth.
Depth is compared after fitting scale and shift. *Tokens of the truth* is the limit that the tokenizers set. The *guess*
is the mean, or most frequent, value of each pixel in {SHARD_SIZE} training scenes, and the boxes and the caption of
another scene.

{"PASSED" if passed else "FAILED"}. To pass, the losses of depth, normals, segmentation, captions and boxes must be
clearly below the entropy (by at least {report.CLEAR_GAIN} nats), and the generated depth, normals, segmentation and
objects in captions must be better than the guess.
The model was trained for {facts["steps"]} steps; the training was stopped on purpose at step {facts["stopped_at"]} and
resumed. Seconds: {_list_seconds(seconds)}.
"""
    report.write(demo.out, results, facts, text)
    print(text)
    files = {
        "report": "report.md",
        "curves": "curves.png",
        "data": "samples.png",
        "from RGB": "generated/sheet.png",
        "from words": "generated/words/sheet.png",
    }
    for title, name in files.items():
        print(f"{title + ':':12}{demo.out / name}")
    return 0 if passed else 1


STAGES: dict[str, Callable[[Demo], int | None]] = {
    "render": render,
    "vocabulary": vocabulary,
    "tokenizers": tokenizers,
    "tokenize": tokenize,
    "train": train,
    "generate": generate,
    "report": summarize,
}


def parse(argv: list[str] | None = None) -> DemoOptions:
    return parse_options(DemoOptions, argv, "Render a small multimodal data set, train a 4M model on it, and report.")


def run(options: DemoOptions) -> int:
    """Run the stages and return the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that child processes are stopped too
    demo = Demo(options)
    if network.MODALITY in demo.tokenized:
        network.weights_file()  # fails now if it is missing, rather than after minutes of rendering
    demo.save()
    status = 0
    for name in STAGES:
        if name in options.stages.split(","):
            print(f"── {name}", flush=True)
            start = time.monotonic()
            try:
                status = STAGES[name](demo) or 0
            except KeyboardInterrupt:
                print(f"\ninterrupted during {name}; run the same command again to continue")
                return 128 + signal.SIGINT
            finally:
                seconds = demo.record["seconds"]
                seconds[name] = round(seconds.get(name, 0) + time.monotonic() - start, 1)
                demo.save()
    return status


def _list_seconds(seconds: dict[str, float]) -> str:
    total = sum(seconds.values())
    return ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()) + f"; {total:.0f} in total"

"""The work of one user: what is given, versions of the results that can be undone, regions that are generated again.

Nothing in this module depends on the interface.
"""

from __future__ import annotations

import io
import json
import tempfile
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fourm.generation.decoding import Decoded, kind_of
from fourm.generation.inputs import is_given, read_value
from fourm.generation.plotting import as_image, titles_of
from fourm.generation.results import write_result
from fourm.generation.sampler import Result, Sampler, Step
from fourm.utils.errors import UserError
from fourm.utils.options import Options, option

MAX_SEED = 2**53
"""Numbers up to here are exact in browsers."""


@dataclass(frozen=True, kw_only=True)
class Limits(Options):
    """Limits on what users may ask for."""

    max_upload_mib: float = option("maximum size of an uploaded picture in MiB", 20.0, above=0, at_most=1000)
    max_samples: int = option("maximum number of results that a user generates at a time", 4, at_least=1, at_most=64)
    max_versions: int = option("number of versions that a user can undo", 20, at_least=1, at_most=1000)
    max_users: int = option("number of users whose results are kept", 32, at_least=1, at_most=10_000)
    queue_size: int = option("number of requests that may wait for the model", 16, at_least=1, at_most=10_000)


@dataclass(frozen=True, kw_only=True)
class Request:
    """How to generate.

    Attributes:
        targets: Modalities to generate, in this order.
        samples: Number of results, which are generated as one batch.
        seed: Seed of the first result; the others use the seeds after it.
        settings: Further arguments of the sampler.
    """

    targets: Sequence[str] = ()
    samples: int = 1
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Version:
    """Results, in one state.

    Attributes:
        title: What was done last.
        results: The samples.
        given: Names of the inputs.
        targets: The modalities that were generated, in this order.
        seeds: The seed of each sample.
        steps: What was done, with all settings, from the first step to the last.
        complete: Whether the last step was not stopped early.
    """

    title: str
    results: tuple[Result, ...]
    given: tuple[str, ...]
    targets: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: tuple[Mapping[str, Any], ...] = ()
    complete: bool = True


class Session:
    """The work of one user.

    Args:
        sampler: The model, which all users share.
        limits: The limits.

    Attributes:
        versions: Versions of the results, the newest last.
        picture: The modality and the value of the picture that was given, if there is one.
    """

    def __init__(self, sampler: Sampler, limits: Limits | None = None):
        self.sampler, self.limits = sampler, limits or Limits()
        self.versions: list[Version] = []
        self.picture: tuple[str, Decoded] | None = None
        self._running, self._cancelled = threading.Lock(), threading.Event()

    @property
    def current(self) -> Version | None:
        """The newest version, or None if nothing has been generated yet."""
        return self.versions[-1] if self.versions else None

    @property
    def is_running(self) -> bool:
        return self._running.locked()

    def undo(self) -> Version | None:
        """Discard the newest version and return the one before it.

        Raises:
            UserError: If there is nothing to undo, or a generation is running.
        """
        if self.is_running:
            raise UserError("stop the generation before you undo")
        if not self.versions:
            raise UserError("there is nothing to undo")
        self.versions.pop()
        return self.current

    def cancel(self) -> None:
        """Stop a running generation after its current step; what it has generated so far is kept."""
        self._cancelled.set()

    def generate(self, inputs: Mapping[str, Any], request: Request) -> Iterator[tuple[Step, Version]]:
        """Generate the targets that are not among the inputs.

        Args:
            inputs: Maps modalities by their full names to values.
            request: The settings.

        Yields:
            Each step with the version so far, which has no results until it is finished or stopped; then it is in
            :attr:`versions`.

        Raises:
            UserError: If the request does not fit the model or the limits, or another generation is running.
        """
        if not inputs:
            raise UserError("drop a picture or type a caption first")
        self._check(request)
        given = {name: self.sampler.inputs[name] for name in inputs}
        targets = tuple(name for name in request.targets if not is_given(self.sampler.targets[name], given))
        if not targets:
            raise UserError("choose something to generate that is not given")
        version = Version("generated", (), tuple(inputs), targets, (), ())
        return self._run(version, inputs, {}, targets, request)

    def editable(self, sample: int = 0) -> list[str]:
        """Return the images of a sample of which regions can be generated again.

        They are images of tokens that the model both reads and generates, and pictures that were given as pixels.
        """
        if self.current is None or not 0 <= sample < len(self.current.results):
            return []
        result = self.current.results[sample]
        names = [n for n, m in self.sampler.targets.items() if m.type == "img" and n in self.sampler.inputs]
        return [name for name in names if name in result or self._pixels_of(name, result)]

    def grid(self, name: str) -> tuple[int, int]:
        """Return the number of rows and columns of tokens of an image."""
        tokens = self.sampler.targets[name].max_tokens or 1
        side = round(tokens**0.5)
        return (side, side) if side * side == tokens else (1, tokens)

    def picture_of(self, name: str, sample: int) -> np.ndarray:
        """Return the picture (H, W, 3) of one of :meth:`editable`."""
        assert self.current is not None
        result = self.current.results[sample]
        return _image(result[name if name in result else str(self._pixels_of(name, result))])

    def conditions(self, name: str, sample: int = 0) -> tuple[list[str], list[str]]:
        """Return what can condition a region of ``name``, and what does so by default, which is what was given."""
        assert self.current is not None
        result = self.current.results[sample]
        hidden = {name, self._pixels_of(name, result)}
        possible = [other for other in result if other in self.sampler.inputs and other not in hidden]
        return possible, [other for other in possible if other in self.current.given]

    def later_targets(self, name: str) -> list[str]:
        """Return the targets that were generated after ``name`` and so may have depended on it."""
        assert self.current is not None
        targets = self.current.targets
        return [*(targets[targets.index(name) + 1 :] if name in targets else targets)]

    def regenerate(
        self,
        name: str,
        sample: int,
        cells: Sequence[int],
        conditions: Sequence[str],
        request: Request,
        changed: Mapping[str, Any] | None = None,
    ) -> Iterator[tuple[Step, Version]]:
        """Generate a region of an image again, and then the targets of the request, conditioned on the new image.

        Args:
            name: The image, one of :meth:`editable`.
            sample: Index of the sample; the new results are variations of it.
            cells: Indices of the tokens of the region, in row-major order.
            conditions: Modalities of the sample that condition the region and the targets.
            request: The settings; its targets are generated after the region.
            changed: New values of conditions, such as another caption.

        Yields:
            See :meth:`generate`.

        Raises:
            UserError: If the arguments do not fit the sample, the model or the limits.
        """
        if name not in self.editable(sample) or self.current is None:
            raise UserError(f"there is no image '{name}' whose regions could be generated again")
        rows, columns = self.grid(name)
        if not cells or not all(type(cell) is int and 0 <= cell < rows * columns for cell in cells):
            raise UserError("select the region to generate again")
        possible, _ = self.conditions(name, sample)
        unknown = [other for other in conditions if other not in possible]
        if unknown:
            raise UserError(f"'{unknown[0]}' cannot condition this region")
        self._check(request)
        base = dict(self.current.results[sample])
        tokens = self._tokens(name, base)
        kept = tokens.flatten().clone()
        kept[[*cells]] = -1
        inputs: dict[str, Any] = {other: base[other] for other in conditions}
        inputs |= {other: value for other, value in (changed or {}).items() if other in inputs}
        later = tuple(t for t in request.targets if t != name and t not in inputs)
        inputs[name] = Decoded("tokens", None, tensor=kept.view(tokens.shape))
        base.pop(str(self._pixels_of(name, base)), None)  # it would show the old region
        (title,) = titles_of([name])
        settings = {
            key: dict(value) if isinstance(value, Mapping) else value for key, value in request.settings.items()
        }
        steps = settings.get("decoding_steps")
        if isinstance(steps, dict) and name in steps:
            steps[name] = min(steps[name], len(set(cells)))
        given = tuple(n for n in (*self.current.given, name) if n in base and n not in (name, *later))
        targets = tuple(dict.fromkeys([*(t for t in self.current.targets if t in base), name, *later]))
        version = replace(
            self.current,
            title=f"{title}: region of {len(set(cells))} tokens",
            given=given,
            targets=targets,
            complete=True,
        )
        request = replace(request, settings=settings)
        return self._run(
            version, inputs, base, (name, *later), request, {"sample": sample, "region": {name: sorted(set(cells))}}
        )

    def archive(self) -> bytes:
        """Return a ZIP file of the current version: a folder per sample, and ``steps.json``.

        Raises:
            UserError: If there are no results.
        """
        version = self.current
        if version is None:
            raise UserError("there are no results to download")
        buffer = io.BytesIO()
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(buffer, "w") as archive:
            for index, (result, seed) in enumerate(zip(version.results, version.seeds, strict=True)):
                path = Path(folder, f"sample-{index}")
                write_result(path, result, {"seed": seed})
                for file in sorted(path.iterdir()):
                    archive.write(file, f"{path.name}/{file.name}")
            archive.writestr("steps.json", json.dumps(version.steps, indent=1) + "\n")
        return buffer.getvalue()

    def _run(
        self,
        version: Version,
        inputs: Mapping[str, Any],
        base: Mapping[str, Decoded],
        targets: Sequence[str],
        request: Request,
        note: Mapping[str, Any] | None = None,
    ) -> Iterator[tuple[Step, Version]]:
        """Generate ``targets`` of a batch, and append the version at the end.

        Args:
            version: The version without its results.
            inputs: The inputs of each sample.
            base: Other modalities of each sample, which stay as they are.
            targets: The modalities to generate.
            request: The settings.
            note: What to add to the record of this step.
        """
        if not self._running.acquire(blocking=False):
            raise UserError("a generation is running already; stop it, or wait for it")
        try:
            self._cancelled.clear()
            seeds = tuple(range(request.seed, request.seed + request.samples))
            steps = self.sampler.generate_iter([inputs] * request.samples, targets, list(seeds), **request.settings)
            record = {
                "conditions": [name for name in inputs if name not in targets],
                "targets": [*targets],
                "seeds": [*seeds],
                "settings": dict(request.settings),
                **(note or {}),
            }
            for step in steps:
                complete = step.number == step.total
                last = complete or self._cancelled.is_set()
                reached = replace(
                    version,
                    seeds=seeds,
                    complete=complete,
                    steps=(*version.steps, {**record, "complete": complete}),
                )
                if last:
                    results = tuple({**base, **result} for result in step.results())
                    self.versions.append(replace(reached, results=results))
                    del self.versions[: -self.limits.max_versions]
                yield replace(step, results=_over(base, step)), self.versions[-1] if last else reached
                if last:
                    break
        finally:
            self._running.release()

    def _check(self, request: Request) -> None:
        if not 1 <= request.samples <= self.limits.max_samples:
            raise UserError(f"choose 1 to {self.limits.max_samples} samples")
        if not 0 <= request.seed <= MAX_SEED:
            raise UserError(f"the seed must be a whole number from 0 to {MAX_SEED}")
        unknown = [name for name in request.targets if name not in self.sampler.targets]
        if unknown:
            raise UserError(f"'{unknown[0]}' is not a target of this model")

    def _pixels_of(self, name: str, result: Mapping[str, Decoded]) -> str | None:
        """Return the pixels of a sample that the tokens ``name`` would be made from, if there are any."""
        target = self.sampler.targets[name]
        if kind_of(target) not in self.sampler.tokenizers:
            return None
        pixels = (n for n in result if n in self.sampler.inputs and self.sampler.inputs[n].is_pixels)
        return next((n for n in pixels if is_given(target, {n: self.sampler.inputs[n]})), None)

    def _tokens(self, name: str, result: Mapping[str, Decoded]) -> Any:
        if name in result:
            return result[name].tensor
        pixels = _image(result[str(self._pixels_of(name, result))])
        return read_value(Image.fromarray(pixels), self.sampler.targets[name], self.sampler.tokenizers, None, None)


def _image(decoded: Decoded) -> np.ndarray:
    image = as_image(decoded)
    assert image is not None  # images of tokens always have a picture
    return image


def _over(base: Mapping[str, Decoded], step: Step) -> Any:
    return lambda: [{**base, **result} for result in step.results()]


class Sessions:
    """The sessions of all users. The one that has not been used for longest makes room for a new one.

    Args:
        sampler: The model.
        limits: The limits.
    """

    def __init__(self, sampler: Sampler, limits: Limits):
        self.sampler, self.limits = sampler, limits
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, key: str) -> Session:
        """Return the session of a user, which is new if there is none.

        Raises:
            UserError: If too many users are generating.
        """
        with self._lock:
            if key not in self._sessions:
                if len(self._sessions) >= self.limits.max_users:
                    idle = next((other for other, session in self._sessions.items() if not session.is_running), None)
                    if idle is None:
                        raise UserError("too many users are generating; try again later")
                    del self._sessions[idle]
                self._sessions[key] = Session(self.sampler, self.limits)
            self._sessions.move_to_end(key)
            return self._sessions[key]

    def drop(self, key: str) -> None:
        """Stop and forget the work of a user who has left."""
        with self._lock:
            session = self._sessions.pop(key, None)
        if session is not None:
            session.cancel()

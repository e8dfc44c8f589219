"""The interface: a form on the left, results on the right. All that it does is in :mod:`fourm.app.session`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fourm.app import cards
from fourm.app.forms import (
    COLUMNS,
    FIELDS,
    MAX_CHARACTERS,
    default_rows,
    picture_modalities,
    read_picture,
    read_settings,
    read_texts,
    target_modalities,
    text_modalities,
)
from fourm.app.session import MAX_SEED, Limits, Request, Session, Sessions, Version
from fourm.generation.decoding import kind_of
from fourm.generation.plotting import as_image, titles_of
from fourm.generation.sampler import Sampler, Step
from fourm.utils.dependencies import optional_import
from fourm.utils.errors import UserError, is_out_of_memory

FOLDER = Path(__file__).parent
KEPT_SECONDS = 600
"""How long results can be downloaded; uploads are removed as soon as they are read."""

_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
_REGION = """<div class="editor"><div class="picture ${value.sharp ? 'sharp' : ''}">
<img src="${value.picture}" alt="region"><svg viewBox="0 0 ${value.columns} ${value.rows}" preserveAspectRatio="none">
${Array.from({length: value.rows * value.columns}, (_, i) =>
`<rect x="${i % value.columns}" y="${Math.floor(i / value.columns)}" width="1" height="1"
class="${value.cells.includes(i) ? 'on' : ''}"/>`).join("")}</svg></div>
<div class="tools"><span>${value.cells.length} of ${value.rows * value.columns} tokens selected</span>
<button type="button" data-tool="all">all</button><button type="button" data-tool="none">none</button></div></div>"""
_EMPTY_REGION = {"picture": "", "rows": 1, "columns": 1, "cells": [], "sharp": False}
_SCROLL = """() => document.getElementById("editor")?.scrollIntoView({block: "start", behavior: "smooth"})"""
_CLICK = """element.addEventListener("click", (event) => {
  const edit = event.target.closest("[data-modality]");
  if (edit) trigger("click", {modality: edit.dataset.modality, sample: Number(edit.dataset.sample)});
});"""


def import_gradio(folder: Path) -> Any:
    """Import gradio without analytics; its temporary files, such as uploads, go to ``folder``.

    Raises:
        MissingDependency: If gradio is not installed.
    """
    # Gradio reads these variables when it is imported.
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with optional_import("gradio", "the app", "'fourm[app]'"):
        import gradio
    return gradio


class Page:
    """The interface of a model.

    Args:
        sampler: The model.
        limits: Limits of each user.
        name: Name of the model.
        folder: Folder for temporary files.
    """

    def __init__(self, sampler: Sampler, limits: Limits, name: str, folder: Path):
        self.gradio = import_gradio(folder)
        self.sampler, self.limits, self.name, self.folder = sampler, limits, name, folder
        self.sessions = Sessions(sampler, limits)
        self.pictures, self.texts = picture_modalities(sampler), text_modalities(sampler)
        self.targets = target_modalities(sampler)
        self.blocks = self._build()

    def launch(self, host: str, port: int) -> str:
        """Start the server in the background and return its URL.

        Raises:
            UserError: If the port is in use.
        """
        try:
            _, url, _ = self.blocks.launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                show_error=False,
                max_file_size=int(self.limits.max_upload_mib * 2**20),
                css_paths=[FOLDER / "page.css"],
                theme=self._theme(),
                ssr_mode=False,
                footer_links=[],
                enable_monitoring=False,
                mcp_server=False,
                state_session_capacity=self.limits.max_users,
            )
        except OSError as error:
            raise UserError(f"the app cannot listen on {host}, port {port}; choose another port") from error
        return url

    def _theme(self) -> Any:
        # Strings would be fine, too, but gradio's defaults name fonts that the browser would have to load.
        fonts = [self.gradio.themes.Font(name) for name in _FONTS]
        mono = [self.gradio.themes.Font("ui-monospace"), self.gradio.themes.Font("monospace")]
        return self.gradio.themes.Default(primary_hue="blue", neutral_hue="gray", font=fonts, font_mono=mono)

    def remove_old_files(self) -> None:
        """Remove temporary files that are older than :data:`KEPT_SECONDS`, such as archives and broken uploads."""
        for path in self.folder.rglob("*"):
            try:
                if path.is_file() and time.time() - path.stat().st_mtime > KEPT_SECONDS:
                    path.unlink()
            except FileNotFoundError:
                continue  # somebody else has removed it

    # The layout.

    def _build(self) -> Any:
        gr = self.gradio
        with gr.Blocks(title=f"4M: {self.name}", analytics_enabled=False, fill_width=True) as blocks:
            gr.HTML(self._head(), elem_id="head")
            with gr.Row(equal_height=False):
                with gr.Column(scale=4, min_width=340):
                    form = self._form()
                with gr.Column(scale=9, min_width=480):
                    with gr.Row(elem_id="actions"):
                        form["generate"] = gr.Button("Generate", variant="primary", min_width=110, elem_id="generate")
                        form["stop"] = gr.Button("Stop", min_width=70, elem_id="stop")
                        form["undo"] = gr.Button("Undo", min_width=70, interactive=False, elem_id="undo")
                        form["download"] = gr.DownloadButton(
                            "Download", min_width=90, interactive=False, elem_id="download"
                        )
                    status = gr.HTML(_idle("Ready."), elem_id="status")
                    with gr.Column(visible=False, elem_id="editor") as editor:
                        parts = self._editor()
                    results = gr.HTML(cards.samples((), (), ()), elem_id="results", js_on_load=_CLICK)
            self._connect(blocks, form, status, editor, parts, results)
        blocks.queue(max_size=self.limits.queue_size, default_concurrency_limit=8)
        return blocks

    def _head(self) -> str:
        model = self.sampler.generation.model
        size = sum(parameter.numel() for parameter in model.parameters())
        return (
            f"<h1>{cards.escape(self.name)}</h1><p>{size / 1e6:.1f} M parameters on {model.mask_token.device} · reads "
            f"{len(self.sampler.inputs)} modalities, generates {len(self.targets)}</p>"
        )

    def _form(self) -> dict[str, Any]:
        gr, form = self.gradio, {}
        if self.pictures:
            form["upload"] = gr.File(
                label="Picture",
                file_count="single",
                type="filepath",
                height=130,
                elem_id="upload",
                file_types=[".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"],
            )
            form["kind"] = gr.Dropdown(
                [*zip(titles_of(self.pictures), self.pictures, strict=True)],
                value=self.pictures[0],
                label="The picture shows",
                visible=len(self.pictures) > 1,
            )
            form["given"] = gr.HTML("", elem_id="given")
        for name in self.texts:
            field = FIELDS[kind_of(self.sampler.inputs[name])]
            form[name] = gr.Textbox(
                label=field.label,
                placeholder=field.placeholder,
                lines=2 if field.label.startswith("Boxes") else 1,
                max_lines=6,
                max_length=MAX_CHARACTERS,
                elem_id=f"text-{name}",
            )
        form["targets"] = gr.Dropdown(
            [*zip(titles_of(self.targets), self.targets, strict=True)],
            value=[*self.sampler.default_targets],
            multiselect=True,
            label="Generate, in this order",
            info="What is given is not generated.",
            elem_id="targets",
        )
        with gr.Row():
            form["samples"] = gr.Number(
                1,
                label="Samples",
                precision=0,
                minimum=1,
                maximum=self.limits.max_samples,
                min_width=80,
                elem_id="samples",
            )
            form["seed"] = gr.Number(
                0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=110, elem_id="seed"
            )
        with gr.Accordion("Temperature, guidance and steps", open=False):
            form["rows"] = gr.Dataframe(
                default_rows(self.sampler),
                headers=list(COLUMNS),
                type="array",
                static_columns=[0],
                interactive=True,
                datatype=["str", "number", "number", "number"],
                row_count=(len(self.targets), "fixed"),
                column_count=(len(COLUMNS), "fixed"),
                show_label=False,
                wrap=False,
                max_height=420,
                elem_id="settings",
            )
            with gr.Row():
                form["top_k"] = gr.Number(
                    self.sampler.defaults.top_k or 0, label="top-k (0 = all)", precision=0, minimum=0, min_width=100
                )
                form["top_p"] = gr.Number(
                    self.sampler.defaults.top_p or 0,
                    label="top-p (0 = all)",
                    minimum=0,
                    maximum=1,
                    step=0.05,
                    min_width=100,
                )
            form["reset"] = gr.Button("Defaults", size="sm", variant="secondary")
        return form

    def _editor(self) -> dict[str, Any]:
        gr, parts = self.gradio, {}
        with gr.Row(equal_height=False):
            parts["region"] = gr.HTML(
                _EMPTY_REGION,
                html_template=_REGION,
                js_on_load=(FOLDER / "page.js").read_text(),
                elem_id="region",
                padding=True,
            )
            with gr.Column(min_width=260):
                parts["title"] = gr.HTML("", padding=True)
                parts["conditions"] = gr.Dropdown(
                    [],
                    multiselect=True,
                    label="Conditioned on",
                    info="Texts are taken from the form.",
                    elem_id="conditions",
                )
                parts["later"] = gr.Dropdown(
                    [],
                    multiselect=True,
                    label="Then generate again",
                    info="What was generated after it.",
                    elem_id="later",
                )
                with gr.Row():
                    parts["regenerate"] = gr.Button(
                        "Regenerate", variant="primary", min_width=110, elem_id="regenerate"
                    )
                    parts["close"] = gr.Button("Close", min_width=70, elem_id="close")
        parts["edited"] = gr.State()
        return parts

    # The behaviour.

    def _connect(self, blocks: Any, form: dict, status: Any, editor: Any, parts: dict, results: Any) -> None:
        gr = self.gradio
        outcome = [status, results, form["undo"], form["download"]]
        texts = [form[name] for name in self.texts]
        how = [form[key] for key in ("samples", "seed", "rows", "top_k", "top_p")]
        model = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "hidden"}
        quick = {"show_progress": "hidden", "concurrency_limit": 8}

        def generate(session: Session, targets: Any, *values: Any) -> Iterator[tuple[Step, Version]]:
            return self._generate(session, targets, values)

        def regenerate(session: Session, edited: Any, region: Any, conditions: Any, later: Any, *values: Any):
            return self._regenerate(session, edited, region, conditions, later, values)

        generate, regenerate = self._reported(generate), self._reported(regenerate)
        hide = {"fn": lambda: gr.update(visible=False), "outputs": editor, **quick}
        form["generate"].click(**hide)
        form["generate"].click(generate, [form["targets"], *how, *texts], outcome, api_name="generate", **model)
        for box in texts:
            box.submit(**hide)
            box.submit(generate, [form["targets"], *how, *texts], outcome, api_visibility="private", **model)
        outputs = [editor, parts["region"], parts["title"], parts["conditions"], parts["later"], parts["edited"]]
        results.click(
            self._with_session(self._edit, event=gr.EventData), None, outputs, api_visibility="private", **quick
        )
        parts["close"].click(**hide)
        parts["regenerate"].click(
            regenerate,
            [*(parts[key] for key in ("edited", "region", "conditions", "later")), *how, *texts],
            outcome,
            api_visibility="private",
            **model,
        ).then(**hide)
        if self.pictures:
            given = [form["given"], status, form["upload"]]
            form["upload"].upload(
                self._with_session(self._upload), [form["upload"], form["kind"]], given, api_name="upload", **quick
            )
            form["upload"].clear(self._with_session(_forget), None, form["given"], api_visibility="private", **quick)
        form["stop"].click(self._with_session(Session.cancel), queue=False, api_name="stop", **quick)
        form["undo"].click(self._with_session(self._undo), None, [*outcome, editor], api_name="undo", **quick)
        form["reset"].click(lambda: default_rows(self.sampler), None, form["rows"], api_visibility="private", **quick)
        blocks.unload(self._typed(lambda request: self.sessions.drop(_key(request)), request=gr.Request))

    def _typed(self, function: Callable, **types: Any) -> Callable:
        """Annotate parameters with classes of gradio, by which it recognises that it is to provide them."""
        function.__annotations__ = types
        return function

    def _with_session(self, function: Callable, **types: Any) -> Callable:
        """Return an event handler that calls ``function`` with the session of the user and the values of the form."""

        def handle(request, *values):
            try:
                return function(self.sessions.get(_key(request)), *values)
            except UserError as error:
                raise self.gradio.Error(cards.escape(error), print_exception=False) from error

        def handle_event(request, event):
            return handle(request, event)

        return self._typed(handle_event if types else handle, request=self.gradio.Request, **types)

    def _upload(self, session: Session, path: str | None, kind: str) -> tuple[Any, ...]:
        gr = self.gradio
        try:
            try:
                if path is None:
                    raise UserError("drop a picture first")
                decoded = read_picture(path, kind, self.sampler, int(self.limits.max_upload_mib * 2**20))
            finally:
                if path is not None and Path(path).resolve().is_relative_to(self.folder.resolve()):
                    Path(path).unlink(missing_ok=True)
        except UserError as error:
            session.picture = None
            return "", _error(error), None
        session.picture = (kind, decoded)
        image = as_image(decoded)
        assert image is not None
        return cards.picture(image, kind) + "<p>This is what the model sees.</p>", _idle("Ready."), gr.skip()

    def _undo(self, session: Session) -> tuple[Any, ...]:
        gr = self.gradio
        try:
            version = session.undo()
        except UserError as error:
            return _error(error), *[gr.skip()] * 4
        text = f"Back to: {version.title}." if version else "Ready."
        return *self._outputs(session, version, _idle(text)), gr.update(visible=False)

    def _generate(self, session: Session, targets: Any, values: tuple) -> Iterator[tuple[Step, Version]]:
        request, texts = self._request(targets, values)
        picture = dict([session.picture]) if session.picture else {}
        return session.generate({**picture, **texts}, request)

    def _regenerate(
        self, session: Session, edited: Any, region: Any, conditions: Any, later: Any, values: tuple
    ) -> Iterator[tuple[Step, Version]]:
        request, texts = self._request(later, values)
        cells = region.get("cells") if isinstance(region, dict) else None
        if not edited or not isinstance(cells, list) or not isinstance(conditions, list):
            raise UserError("choose an image and select the region to generate again")
        name, sample = edited
        return session.regenerate(name, sample, cells, conditions, request, changed=texts)

    def _request(self, targets: Any, values: tuple) -> tuple[Request, dict[str, Any]]:
        samples, seed, rows, top_k, top_p, *texts = values
        settings = read_settings(rows, self.sampler)
        if not (isinstance(top_k, (int, float)) and top_k >= 0 and isinstance(top_p, (int, float)) and 0 <= top_p <= 1):
            raise UserError("top-k must be at least 0, and top-p from 0 to 1")
        if samples is None or seed is None:
            raise UserError("type the number of samples and the seed")
        request = Request(
            targets=tuple(targets or ()),
            samples=int(samples),
            seed=int(seed),
            settings={**settings, "top_k": int(top_k), "top_p": float(top_p)},
        )
        return request, read_texts(dict(zip(self.texts, texts, strict=True)), self.sampler)

    def _reported(self, start: Callable[..., Iterator[tuple[Step, Version]]]) -> Callable:
        """Return an event handler that runs a generation and shows its progress.

        Drawing takes at most about a third of the time.
        """
        gr = self.gradio

        def handle(request, *values):
            began, pause, last, version = time.monotonic(), 0.1, 0.0, None
            try:
                session = self.sessions.get(_key(request))
                for step, version in start(session, *values):
                    now = time.monotonic()
                    if version.results or now - last < pause:
                        continue
                    html = cards.samples(
                        step.results(), version.given, version.targets, version.seeds, running=step.target
                    )
                    last = time.monotonic()
                    pause = max(0.1, 2 * (last - now))
                    text = f"Generating {titles_of([step.target])[0]}: step {step.number} of {step.total}"
                    yield _progress(text, step.number / step.total), html, gr.skip(), gr.skip()
            except UserError as error:
                yield _error(error), gr.skip(), gr.skip(), gr.skip()
                return
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                text = "out of memory: generate fewer samples at a time, or fewer modalities"
                yield _error(text), gr.skip(), gr.skip(), gr.skip()
                return
            assert version is not None  # there is at least one step
            word = "Finished" if version.complete else "Stopped"
            yield self._outputs(session, version, _idle(f"{word} after {time.monotonic() - began:.1f} s."))

        return self._typed(handle, request=gr.Request)

    def _outputs(self, session: Session, version: Version | None, status: str) -> tuple[Any, ...]:
        gr = self.gradio
        if version is None:
            empty = cards.samples((), (), ())
            return status, empty, gr.update(interactive=False), gr.update(value=None, interactive=False)
        html = cards.samples(
            version.results, version.given, version.targets, version.seeds, editable=session.editable()
        )
        archive = self.folder / f"results-{os.urandom(8).hex()}" / "results.zip"
        archive.parent.mkdir(parents=True)
        archive.write_bytes(session.archive())
        return status, html, gr.update(interactive=True), gr.update(value=str(archive), interactive=True)

    def _edit(self, session: Session, event: Any) -> tuple[Any, ...]:
        gr = self.gradio
        data = event._data or {}
        name, sample = data.get("modality"), data.get("sample")
        if type(sample) is not int or name not in session.editable(sample):
            return (gr.update(visible=False), *[gr.skip()] * 5)
        image = session.picture_of(name, sample)
        rows, columns = session.grid(name)
        region = {
            "picture": cards.data_uri(image),
            "rows": rows,
            "columns": columns,
            "cells": [],
            "sharp": min(image.shape[:2]) < 100,
        }
        possible, chosen = session.conditions(name, sample)
        later = session.later_targets(name)
        (title,) = titles_of([name])
        others = [other for other in self.targets if other != name]
        return (
            gr.update(visible=True),
            region,
            f"<b>{cards.escape(title)}, sample {sample + 1}</b>: drag over the tokens to generate again.",
            gr.update(choices=[*zip(titles_of(possible), possible, strict=True)], value=chosen),
            gr.update(choices=[*zip(titles_of(others), others, strict=True)], value=later),
            (name, sample),
        )


def _key(request: Any) -> str:
    return str(request.session_hash)


def _forget(session: Session) -> str:
    session.picture = None
    return ""


def _idle(text: str) -> str:
    return f'<p class="idle">{cards.escape(text)}</p>'


def _error(error: Exception | str) -> str:
    return f'<p class="error">{cards.escape(error)}</p>'


def _progress(text: str, fraction: float) -> str:
    return f'<p>{cards.escape(text)}</p><div class="bar"><i style="width: {fraction:.1%}"></i></div>'

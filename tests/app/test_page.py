"""The app as a process: a headless browser uses the page, and a client of its API fills the queue."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fourm.app.command import AppOptions, load
from fourm.app.forms import default_rows
from fourm.app.page import import_gradio
from fourm.demo.scene import CLASSES
from fourm.generation.decoding import kind_of
from fourm.generation.options import DEMO_MODEL
from fourm.utils.config import load_yaml
from fourm.utils.errors import MissingDependency
from fourm.utils.options import parse_options
from tests.app.toy_app import DEPTH, RGB, SEMSEG, write_photo
from tests.generation.test_sampler import write_run
from tests.generation.toy_tokenizers import CHANNELS

REPOSITORY = Path(__file__).parents[2]
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def test_the_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")  # restored at the end
    with pytest.raises(MissingDependency, match=r"the app needs the package gradio: pip install 'fourm\[app\]'"):
        import_gradio(tmp_path)


def test_without_a_model_the_shipped_one_is_used_with_its_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = parse_options(AppOptions, ["--device", "cpu"], "", positional=("model",))
    sampler = load(options)
    settings = load_yaml(DEMO_MODEL / "generation.yaml")
    assert "-".join(kind_of(sampler.targets[name]) for name in sampler.default_targets) == settings["target_domains"]
    assert sampler.class_names == CLASSES
    rows = {row[0]: row[1:] for row in default_rows(sampler)}
    assert rows["rgb"] == [settings["temps"]["rgb"], settings["cfg_scales"]["rgb"], settings["decoding_steps"]["rgb"]]


def test_the_folder_of_a_demo_is_a_model(tmp_path):
    write_run(tmp_path)
    (tmp_path / "run").rename(tmp_path / "training")
    (tmp_path / "words.json").rename(tmp_path / "vocabulary.json")
    (tmp_path / "demo.json").write_text("{}")
    sampler = load(AppOptions(model=str(tmp_path), device="cpu"))
    assert {*CHANNELS} == sampler.tokenizers.keys() and sampler.class_names == CLASSES


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The app with a toy model: its URL, the folder for its temporary files, and a folder with ``photo.png``."""
    pytest.importorskip("gradio", reason="the app needs gradio: pip install 'fourm[app]'")
    folder = write_run(tmp_path_factory.mktemp("app"))
    write_photo(folder / "photo.png")
    (folder / "tmp").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fourm", "app", folder / "run", "--tokenizers", folder / "tokenizers"]
    command += ["--port", port, "--queue_size", 2, "--max_upload_mib", 0.1, "--device", "cpu"]
    environment = {**os.environ, "TMPDIR": str(folder / "tmp"), "NO_PROXY": "127.0.0.1"}
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(
            [*map(str, command)], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            lines = iter(process.stdout.readline, "")
            url = next((match[0] for line in lines if (match := re.match(r"http://127\.0\.0\.1:\d+/", line))), None)
            assert url, (folder / "log").read_text()
            yield url, folder
            assert process.poll() is None
        finally:
            process.terminate()
            assert process.wait(60) == 128 + signal.SIGTERM
            process.stdout.close()
        assert not list((folder / "tmp").glob("fourm-app-*"))
        assert "fourm/app" not in (folder / "log").read_text()  # gradio logs tracebacks of the requests that it refuses


@pytest.fixture
def page(app):
    """The page in a browser; at the end, the browser has sent requests only to the app."""
    api = pytest.importorskip(
        "playwright.sync_api", reason="driving a browser needs playwright: pip install playwright"
    )
    if CHROMIUM is None:
        pytest.skip("there is no browser: apt install chromium")
    url, _ = app
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(120_000)
        requests, errors = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#generate")
        yield page
        assert not errors
        assert all(re.match(f"{url}|data:|blob:", request) for request in requests), requests
        browser.close()


def wait_for_status(page, pattern):
    page.wait_for_function(f"document.querySelector('#status').innerText.match(/{pattern}/)")


@pytest.mark.slow
def test_a_picture_is_generated_from_edited_downloaded_and_undone(app, page):
    _, folder = app
    page.click("#generate")
    wait_for_status(page, "drop a picture")
    (folder / "fake.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    page.set_input_files("#upload input[type=file]", folder / "fake.png")
    wait_for_status(page, "not an image")
    page.set_input_files("#upload input[type=file]", folder / "photo.png")
    page.wait_for_selector("#given img")
    page.fill("#text-caption textarea, #text-caption input", "<b>a cup</b> ${1+1}")
    page.click("#generate")
    wait_for_status(page, "Finished")
    cards = page.locator("#results .card")
    shown = {card.get_attribute("data-name"): card for card in cards.all()}
    assert RGB in shown and "cup" in shown["caption"].inner_text() and not page.locator("#results b").count()
    assert shown[DEPTH].locator("img").get_attribute("src").startswith("data:image/")
    before = shown[DEPTH].locator("img").get_attribute("src")

    shown[DEPTH].locator(".edit").click()
    page.wait_for_function("document.querySelectorAll('#region rect').length == 16")
    page.locator("#region svg").scroll_into_view_if_needed()
    page.wait_for_timeout(1000)  # the page scrolls smoothly
    box = page.locator("#region svg").bounding_box()
    page.mouse.move(box["x"] + 0.1 * box["width"], box["y"] + 0.1 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.4 * box["height"])
    page.mouse.up()
    page.wait_for_selector("#region :text('8 of 16 tokens selected')")
    page.fill("#seed input", "5")
    page.click("#regenerate")
    page.wait_for_selector("#results h3:text('seed 5')")
    page.wait_for_selector("#editor", state="hidden")
    wait_for_status(page, "Finished")
    picture = page.locator(f"#results .card[data-name='{DEPTH}'] img")
    assert picture.get_attribute("src") != before
    with page.expect_download() as download:
        page.click("#download")
    with zipfile.ZipFile(download.value.path()) as archive:
        assert {"steps.json", f"sample-0/{DEPTH}.png", f"sample-0/{SEMSEG}.png"} <= {*archive.namelist()}
    page.click("#undo")
    wait_for_status(page, "Back to: generated")
    assert picture.get_attribute("src") == before
    leftovers = [path.name for path in (folder / "tmp").rglob("*.png")]
    assert not leftovers  # uploads are removed as soon as they are read


@pytest.mark.slow
def test_requests_beyond_the_queue_and_large_uploads_are_refused(app):
    url, folder = app
    client_library = pytest.importorskip("gradio_client")
    httpx = pytest.importorskip("httpx")
    client = client_library.Client(url, verbose=False)
    answer = httpx.post(f"{url}gradio_api/upload", files={"files": ("large.png", bytes(200_000))}, trust_env=False)
    assert answer.status_code == 413
    (folder / "secret.png").write_bytes((folder / "photo.png").read_bytes())
    for path in (folder / "secret.png", "/etc/passwd"):
        file = {"path": str(path), "meta": {"_type": "gradio.FileData"}, "orig_name": "photo.png"}
        answer = httpx.post(
            f"{url}gradio_api/call/upload", json={"data": [file, RGB], "session_hash": "stranger"}, trust_env=False
        )
        events = httpx.get(f"{url}gradio_api/call/upload/{answer.json()['event_id']}", trust_env=False).text
        assert "event: error" in events and "base64" not in events
    table = {"headers": ["modality", "temperature", "guidance", "steps"], "data": []}
    values = [[DEPTH], 1, 0, table, 0, 0, "a cup", "", ""]
    jobs = [client.submit(*values, api_name="/generate") for _ in range(12)]
    outcomes = [str(job.exception(timeout=120) or job.result()[0]) for job in jobs]
    assert any("Queue is full" in outcome for outcome in outcomes)
    assert any("Finished" in outcome for outcome in outcomes)

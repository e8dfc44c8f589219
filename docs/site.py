"""Hooks of MkDocs: the pages of the site lie as in the repository, so that the same links work in both.

Its pages are the documents in the root and in ``docs/``, files that they link to, and, for each package, a page that
mkdocstrings fills with the docstrings of its modules.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").glob("*.md"))]
LINK = re.compile(r"(?:\]\(|href=\"|src=\")(?!https?:)([^)\s#\"]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of ``docs/`` by those of the whole repository that belong to the site."""
    linked = {
        (document.parent / target).resolve() for document in DOCUMENTS for target in LINK.findall(document.read_text())
    }
    paths = {*DOCUMENTS, *(path for path in linked if path.is_file() and path.is_relative_to(REPOSITORY))}
    pages = [
        File.generated(config, path.relative_to(REPOSITORY).as_posix(), abs_src_path=str(path))
        for path in sorted(paths)
    ]
    packages = [path for path in sorted((REPOSITORY / "fourm").iterdir()) if (path / "__init__.py").exists()]
    pages += [File.generated(config, f"api/{path.name}.md", content=api_page(path)) for path in packages]
    # Files of the theme and of the plugins are no documents.
    return Files([*(file for file in files if not file.src_uri or file.generated_by), *pages])


def api_page(package: Path) -> str:
    """The page of a package: a directive for each of its modules, which are not empty."""
    modules = [
        path for path in sorted(package.rglob("*.py")) if path.name != "__main__.py" and path.read_text().strip()
    ]
    names = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__") for path in modules]
    return "\n\n".join([f"# fourm.{package.name}", *(f"::: {name}" for name in names)])


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Keep only the text of links to folders, which a site cannot show."""

    def text_of_link(link: re.Match[str]) -> str:
        folder = (REPOSITORY / page.file.src_uri).parent / link[2]
        return link[1] if folder.is_dir() else link[0]

    return re.sub(r"\[([^]]*)\]\((?!https?:|#)([^)\s#]+)\)", text_of_link, markdown)


def on_page_content(html: str, **_: object) -> str:
    """Remove the roles of Sphinx from docstrings, such as ``:class:``."""
    return re.sub(r":(?:attr|class|data|func|meth|mod):(?=<code>)", "", html)

"""Adds the pages that are made from the code to the site."""

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from d3po.flows.reference import PAGES

SHIM = "https://unpkg.com/iframe-worker/shim"  # search from file:// needs it; a local server does not


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The site's files with the pages of the reference among them."""
    for name, page in PAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content=page()))
    return files


def without_shim(output: str, **_: object) -> str:
    """The page without the one script that the offline plugin takes from another site."""
    return output.replace(f'<script src="{SHIM}"></script>', "")


on_post_page = on_post_template = without_shim

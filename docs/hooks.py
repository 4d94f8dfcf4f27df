"""MkDocs: the pages that lie outside docs/ (results, recipes, model cards) become part of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OTHERS = ("results/**/*", "recipes/**/*", "benchmarks/NOTES.md", "selfvae/models/*/README.md")
KINDS = (".md", ".html", ".png", ".json", ".csv", ".yaml")


def on_files(files: Files, config: Any) -> Files:
    for pattern in OTHERS:
        for file in sorted(ROOT.glob(pattern)):
            weights = "results/models" in file.as_posix() and file.name != "README.md"
            if file.suffix in KINDS and not weights:
                path = file.relative_to(ROOT).as_posix()
                files.append(File(path, str(ROOT), config["site_dir"], config["use_directory_urls"]))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between docs/ and the rest: in the site docs/ is the root."""
    if page.file.src_uri.startswith(("results/", "recipes/", "benchmarks/", "selfvae/")):
        return re.sub(r"\]\(((?:\.\./)+)docs/", r"](\1", markdown)
    return re.sub(r"\]\(\.\./(results|recipes|benchmarks|selfvae)/", r"](\1/", markdown)

#!/usr/bin/env python3
"""Takes LiteLLM's own database schema and views out of its published packages.

Writes, for `psql -f` with ON_ERROR_STOP:

    target/litellm/migrations.sql   every migration of litellm-proxy-extras, in order
    target/litellm/views.sql        the views that the proxy creates at start-up

Nothing of LiteLLM is imported or committed. Does nothing when both files are newer than this script.
"""

import ast
import re
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from pathlib import Path

PROXY_EXTRAS = "litellm-proxy-extras==0.4.110"
LITELLM = "litellm==1.109.1"
MIGRATIONS, VIEWS = 220, 8  # how many those versions have: anything else means that we read them wrongly

OUT = Path(__file__).resolve().parent.parent / "target" / "litellm"


def download(requirement: str, folder: Path) -> zipfile.ZipFile:
    """The wheel of a pinned package, for whichever Python; it is only read."""
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
         "--only-binary", ":all:", "--python-version", "3.12", "--dest", str(folder), requirement],
        check=True,
    )
    (wheel,) = folder.glob(requirement.split("==")[0].replace("-", "_") + "-*.whl")
    return zipfile.ZipFile(wheel)


def migrations(wheel: zipfile.ZipFile) -> str:
    """All migrations, one after the other. Some build indexes concurrently: run them outside of a transaction."""
    paths = sorted(p for p in wheel.namelist() if re.search(r"/migrations/[^/]+/migration\.sql$", p))
    assert len(paths) == MIGRATIONS, f"{len(paths)} migrations"
    return "\n".join(f"-- migration {p.split('/')[-2]}\n{wheel.read(p).decode().strip()}\n" for p in paths)


def views(wheel: zipfile.ZipFile) -> str:
    """The CREATE VIEW statements: string constants in the function that runs them."""
    tree = ast.parse(wheel.read("litellm/proxy/db/create_views.py"))
    statements = [
        textwrap.dedent(node.value).strip()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        and re.match(r"\s*CREATE\s+(OR\s+REPLACE\s+)?VIEW\b", node.value)
    ]
    assert len(statements) == VIEWS, f"{len(statements)} views"
    return "\n\n".join(s.rstrip(";") + ";" for s in statements) + "\n"


def main() -> None:
    outputs = [OUT / "migrations.sql", OUT / "views.sql"]
    script_time = Path(__file__).stat().st_mtime
    if all(o.exists() and o.stat().st_mtime > script_time for o in outputs):
        return

    print(f"fetching LiteLLM's schema ({PROXY_EXTRAS}, {LITELLM})", flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        texts = [migrations(download(PROXY_EXTRAS, Path(folder))), views(download(LITELLM, Path(folder)))]
    for output, text in zip(outputs, texts):
        output.write_text(text)


if __name__ == "__main__":
    main()

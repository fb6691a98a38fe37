"""Makes the measured results part of the site: pages link to them."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds bench/results as results/."""
    folder = Path(config.docs_dir).parent / "bench" / "results"
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = f"results/{path.relative_to(folder).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files

"""Model cards: the README.md of a folded model, with the table of bytes."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from torch import nn

from bitfold.hf.checks import folded_modules
from bitfold.manifest import QUANT_METHOD

__all__ = ["hook_upload", "model_card", "update_card"]

_BEGIN, _END = "<!-- bitfold: begin -->", "<!-- bitfold: end -->"


def model_card(model: nn.Module, name: str) -> str:
    """A whole README.md (front matter, what it is, the table of bytes, how to load) for a folded model."""
    front = ["---", "library_name: transformers", "tags:", *(f"- {tag}" for tag in _tags(model)), "---"]
    return "\n".join([*front, "", f"# {name}", "", _section(model, name), ""])


def update_card(model: nn.Module, readme: Path, name: str) -> None:
    """Put bitfold's section and tags into a card that may exist already; the rest of it stays.

    The section stands between two comments, so that a later update replaces it.
    """
    if not readme.exists():
        readme.write_text(model_card(model, name), encoding="utf-8")
        return
    from huggingface_hub import ModelCard

    text = readme.read_text(encoding="utf-8")
    section = _section(model, name)
    if _BEGIN in text and _END in text:
        pattern = re.escape(_BEGIN) + ".*?" + re.escape(_END)
        text = re.sub(pattern, lambda _: section, text, count=1, flags=re.DOTALL)
    else:
        text = f"{text.rstrip()}\n\n{section}\n"
    card = ModelCard(text, ignore_metadata_errors=True)
    data: Any = card.data
    present = list(data.tags or [])
    data.tags = present + [tag for tag in _tags(model) if tag not in present]
    card.save(readme)


def hook_upload() -> None:
    """Have `push_to_hub` of folded models put the table of bytes into the card that it uploads.

    transformers writes a generic card after saving and uploads it at once; the upload is the one step that
    every way to the Hub shares, and where both the model and the directory are at hand.
    """
    from transformers.utils.hub import PushToHubMixin

    upload = PushToHubMixin._upload_modified_files
    if hasattr(upload, "__bitfold_hook__"):
        return

    @functools.wraps(upload)
    def upload_with_card(self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, nn.Module) and next(folded_modules(self), None) is not None:
            update_card(self, Path(working_dir) / "README.md", repo_id)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    upload_with_card.__bitfold_hook__ = True  # type: ignore[attr-defined]
    PushToHubMixin._upload_modified_files = upload_with_card


def _tags(model: nn.Module) -> list[str]:
    return [QUANT_METHOD, *sorted({str(module.format) for _, module in folded_modules(model)})]


def _section(model: nn.Module, name: str) -> str:
    formats = ", ".join(f"`{tag}`" for tag in _tags(model)[1:])
    return f"""{_BEGIN}
The weights of this model are folded with bitfold ({formats}): they are packed on disk and in memory, and
computed with in that form. Without `import bitfold` loading it fails.

{_table(model)}

```python
import bitfold

model = bitfold.load("{name}")
```
{_END}"""


def _table(model: nn.Module) -> str:
    """Markdown table of bytes by class of tensor, with a total."""
    from bitfold.summarizing import summary

    table = summary(model)
    lines = ["| tensors | weights | before | folded | ratio |", "|---|---:|---:|---:|---:|"]
    for row in (*table.rows, table.total):
        if row.disk:
            sizes = f"{row.before / 2**20:.2f} MiB | {row.disk / 2**20:.2f} MiB | {row.ratio:.2f}×"
            lines.append(f"| {row.name} | {row.weights:,} | {sizes} |")
    return "\n".join(lines)

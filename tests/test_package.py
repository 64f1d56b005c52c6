"""pip installs every module and data file of minidisp, in a wheel and in an editable install."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")

if not importlib.util.find_spec("setuptools"):
    pytest.skip("needs setuptools", allow_module_level=True)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the files of a clone, without earlier builds."""
    tree = tmp_path_factory.mktemp("clone")
    for name in FILES:
        shutil.copy(ROOT / name, tree)
    for name in ("minidisp", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (tree / "minidisp" / "later").mkdir()  # a sub-package that pyproject.toml does not list
    (tree / "minidisp" / "later" / "__init__.py").touch()
    return tree


def build(hook: str, tree: Path, out: Path) -> Path:
    """Like pip with --no-build-isolation: calls a hook of PEP 517 or 660, and unpacks the wheel."""
    script = f"import sys; from setuptools import build_meta; print(build_meta.{hook}(sys.argv[1]))"
    environment = {**os.environ, "MINIDISP_BUILD": "0"}
    child = subprocess.run(
        [sys.executable, "-c", script, str(out)], cwd=tree, env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    with zipfile.ZipFile(out / child.stdout.splitlines()[-1]) as wheel:
        wheel.extractall(out / "unpacked")
    return out / "unpacked"


def run(script: str, *arguments: object) -> str:
    """Run a script in a process that sees neither this folder, nor PYTHONPATH, nor another installed minidisp."""
    clean = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
    )
    child = subprocess.run(
        [sys.executable, "-I", "-c", clean + script, *map(str, arguments)], cwd="/", capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    return child.stdout


@pytest.mark.slow
def test_the_wheel_holds_every_file_and_works_elsewhere(tree, tmp_path):
    unpacked = build("build_wheel", tree, tmp_path)
    expected = {path.relative_to(tree) for path in tree.glob("minidisp/**/*") if path.is_file()}
    assert {path.relative_to(unpacked) for path in unpacked.glob("minidisp/**/*") if path.is_file()} == expected
    script = """
sys.path.insert(0, sys.argv[1])
import importlib, json, pkgutil, torch, minidisp, minidisp.hf
from importlib import resources
from minidisp import GPT, DispersionLoss, GPTConfig, dispersion_loss, load
for module in pkgutil.walk_packages(minidisp.__path__, "minidisp."):
    importlib.import_module(module.name)
model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=8, block_size=8, vocab_size=16))
output = model(torch.ones(2, 8, dtype=torch.int64), return_hidden_states=True)
module = DispersionLoss()
loss = module(output.hidden_states)
loss.backward()
print(json.dumps({
    "file": minidisp.__file__, "loss": loss.item(), "how": module.prepare("cpu"), "load": callable(load),
    "layer": dispersion_loss(output.hidden_states[1]).item(), "hf": callable(minidisp.hf.load_model),
    "page": resources.files("minidisp.report").joinpath("report.html").read_text("utf-8"),
}))
"""
    found = json.loads(run(script, unpacked))
    assert Path(found["file"]).is_relative_to(unpacked)
    assert found["load"]
    assert found["hf"]
    assert -1 < found["loss"] < 0
    assert -1 < found["layer"] < 0
    assert found["how"].startswith("streamed in PyTorch: ")  # neither the extension nor its sources
    assert found["page"] == (ROOT / "minidisp" / "report" / "report.html").read_text("utf-8")


def test_an_editable_install_finds_every_file(tree, tmp_path):
    unpacked = build("build_editable", tree, tmp_path)
    script = """
import importlib.util, site
site.addsitedir(sys.argv[1])
print(*(importlib.util.find_spec(name).origin for name in sys.argv[2:]), sep="\\n")
"""
    modules = {path: ".".join(path.relative_to(tree).with_suffix("").parts) for path in tree.glob("minidisp/**/*.py")}
    found = run(script, unpacked, *(name.removesuffix(".__init__") for name in modules.values()))
    assert [Path(line) for line in found.splitlines()] == list(modules)
    assert (tree / "minidisp" / "report" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transformers", "says"),
    [
        ("raise ImportError('none here')", "pip install transformers accelerate"),
        ("__getattr__ = lambda name: object", "OUT"),
    ],
    ids=["without transformers", "without an installed minidisp"],
)
def test_the_trainer_example_runs_from_a_clone(tmp_path, transformers, says):
    (tmp_path / "transformers.py").write_text(transformers)
    command = [sys.executable, ROOT / "examples" / "hf_trainer.py"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert says in done.stderr

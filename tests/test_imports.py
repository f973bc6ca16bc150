"""The rooms of the house: imports run one way, one op has one name everywhere, and nothing names somebody's machine."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAPPED = {"kernels": ROOT / "kernels", "bench": ROOT / "bench"}  # rooms that lie outside sparselottery/

GROUND = {"_ext", "kernels"}
# masks is the ground floor: it uses bit operations only, so that everyone, ops too, may use it.
BELOW = {
    "_ext": set(),
    "kernels": set(),
    "masks": {"ops"},  # and of these only bitmask, see violations()
    "ops": GROUND | {"masks"},
    "optim": {"ops", "masks"},
    "nn": GROUND | {"ops", "masks"},
}
BELOW["pruning"] = BELOW["nn"] | {"nn", "optim"}
BELOW["training"] = BELOW["pruning"]
BELOW["tickets"] = BELOW["training"] | {"training", "pruning"}
BELOW["analysis"] = BELOW["tickets"] | {"tickets"}
BELOW["report"] = BELOW["analysis"] | {"analysis"}
BELOW["experiments"] = BELOW["report"] | {"report"}
BELOW["bench"] = BELOW["experiments"] | {"experiments", "__init__"}
BELOW["commands"] = BELOW["bench"] | {"bench"}
BELOW["cli"] = BELOW["commands"] | {"commands"}
BELOW["__main__"] = {"cli"}
BELOW["__init__"] = BELOW["bench"] - {"__init__"} | {"bench"}
ADJACENT = {"_ext": {"kernels"}}  # env_report says whether Triton is there


def sources():
    """(path, dotted module name) of every file of the package."""
    for path in sorted((ROOT / "sparselottery").rglob("*.py")):
        yield path, ".".join(("sparselottery", *path.relative_to(ROOT / "sparselottery").with_suffix("").parts))
    for name, folder in MAPPED.items():
        for path in sorted(folder.glob("*.py")):
            if not path.name.startswith(("test_", "conftest")):
                yield path, f"sparselottery.{name}.{path.stem}"


def imported(tree, module):
    """The full names a module imports, `from . import a` counted as package.a, inside functions too."""
    package = module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{prefix}.{alias.name}", node.lineno) for alias in node.names)


def room(module):
    """sparselottery.ops.bitmask -> ops; a public name of the package itself -> __init__."""
    parts = module.replace("sparselottery._C", "sparselottery._ext").split(".")
    return parts[1] if len(parts) > 1 and parts[1] in BELOW else "__init__"


def violations(path, module, text):
    for name, line in imported(ast.parse(text), module):
        if name.split(".")[0] == "sparselottery":
            here, there = room(module), room(name)
            upward = there != here and there not in BELOW[here] | ADJACENT.get(here, set())
            if upward or (here == "masks" and not name.startswith("sparselottery.ops.bitmask")):
                yield f"{path}:{line}: {here} must not import {there} ({name})"


def test_every_module_has_a_room():
    unknown = {str(p) for p, module in sources() if module.split(".")[1] not in BELOW}
    assert not unknown, f"say in BELOW what these may import: {unknown}"


def test_imports_run_one_way():
    found = [v for path, module in sources() for v in violations(path.relative_to(ROOT), module, path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "text", "red"),
    [
        ("sparselottery.ops.x", "from ..nn import linear", True),
        ("sparselottery.ops.x", "def f():\n    from sparselottery.tickets import imp", True),
        ("sparselottery.ops.x", "import sparselottery.training.trainer", True),
        ("sparselottery.nn.x", "from sparselottery import Ticket", True),
        ("sparselottery.nn.x", "from .. import optim", True),
        ("sparselottery.nn.x", "from ..ops import dispatch\nfrom . import convert\nimport torch.nn", False),
        ("sparselottery.ops.__init__", "from . import bitmask", False),
        ("sparselottery.masks", "from .ops import dispatch", True),
        ("sparselottery.masks", "from .ops.bitmask import pack", False),
        ("sparselottery.cli", "from .experiments import runs", False),
        ("sparselottery.cli", "from .commands import imp", False),
        ("sparselottery.commands.imp", "from ..experiments import runs", False),
        ("sparselottery.commands.imp", "from .. import cli", True),
        ("sparselottery.experiments.x", "from ..commands import common", True),
        ("sparselottery.analysis.x", "from ..tickets import store", False),
        ("sparselottery.analysis.x", "from ..experiments import runs", True),
        ("sparselottery.tickets.x", "from ..analysis import figure", True),
    ],
)
def test_the_walk_sees_upward_imports(module, text, red):
    assert bool(list(violations("x.py", module, text))) is red


def test_imports_without_extension_triton_or_gpu():
    """Every module but the kernels themselves imports with _C and Triton gone; the first use says what is missing."""
    names = [re.sub(r"\.__init__$", "", m) for _, m in sources() if room(m) != "__main__"]
    # the kernels themselves are @triton.jit functions; their package and the gate's command line import anyway
    names = [n for n in names if not re.match(r"sparselottery\.kernels\.(?!aot$)", n)]
    script = f"""
import sys, importlib
sys.modules["triton"] = None
sys.modules["sparselottery._C"] = None
import sparselottery
from sparselottery import _ext, kernels
assert _ext._C is None and not kernels.AVAILABLE and kernels.WHY_NOT
for name in {names}:
    importlib.import_module(name)
try:
    _ext.extension()
except RuntimeError as error:
    print("said:", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "said: sparselottery._C could not be loaded" in done.stdout and "pip install" in done.stdout


def test_import_does_not_load_heavy_or_optional_packages():
    script = (
        "import sys, sparselottery; print(sorted({'triton','matplotlib','sklearn','transformers'} & set(sys.modules)))"
    )
    plain = subprocess.run([sys.executable, "-c", "import sys, torch; print('triton' in sys.modules)"], **CAPTURE)
    done = subprocess.run([sys.executable, "-c", script], **CAPTURE)
    assert done.returncode == 0, done.stderr
    allowed = {"triton"} if plain.stdout.strip() == "True" else set()
    assert set(ast.literal_eval(done.stdout)) <= allowed


def test_the_benchmark_and_the_gpus_tests_need_torch_and_pytest_only():
    """bench/gpu.sh runs on machines where nothing can be installed; numpy only a baseline on the CPU wants."""
    gone = ["numpy", "safetensors", "sklearn", "matplotlib", "hypothesis", "transformers", "xdist", "pytest_timeout"]
    script = f"""
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {gone} else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
import pytest
from sparselottery.bench import memory, registry, report, run, verify
for case in registry.small_cases():
    if case.op not in registry.CPU_ONLY and case.op != "bitmask":
        case.prepare()
assert sorted(set(sys.modules) & set({gone})) == []
raise SystemExit(pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", r"{ROOT / "tests" / "gpu"}"]))
"""
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, **CAPTURE)
    assert done.returncode == 0 and "test_cuda_kernels.py" in done.stdout, done.stdout[-2000:] + done.stderr


CAPTURE = {"capture_output": True, "text": True, "timeout": 120}


@pytest.mark.parametrize("folder", ["kernels"])
def test_kernels_refuse_any_other_name(folder):
    done = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, **CAPTURE)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"ImportError: import these {folder} as")


def test_one_op_one_name_in_every_room():
    ops = {p.stem for p in (ROOT / "sparselottery" / "ops").glob("*.py")}
    stems = [(p, p.stem) for p in (ROOT / "csrc").rglob("*.c*") if p.suffix in (".cpp", ".cu")]
    stems += [(p, p.stem) for p in (ROOT / "kernels").glob("*.py")]
    helpers = {"bindings", "isa", "__init__", "aot"}
    whole = {"whole_step", "network"}  # whole networks at once: no ops
    for path, stem in stems:
        name = re.sub(r"_simd$", "", stem)
        assert name in ops | helpers | whole or any(name.startswith(op + "_") for op in ops | whole), (
            f"{path}: no ops/{name}.py"
        )


def project_files():
    skip = {".git", ".venv", "build", "dist", "runs", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}
    kinds = {".py", ".cpp", ".cu", ".h", ".cuh", ".md", ".toml", ".txt", ".sh", ".in", ".yml", ".json", ".csv", ""}
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        if path.is_file() and path.suffix in kinds and not skip.intersection(parts) and "egg-info" not in str(path):
            yield path


MACHINE_PATH = re.compile(r"(?<![\w.~$}])/(?:work|tmp|root|home|mnt|scratch|Users)/\w")


def test_no_machine_paths():
    found = []
    for path in project_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            outside = "../shared" in line and path != ROOT / ".ci" / "run" and path != Path(__file__).resolve()
            if outside or (MACHINE_PATH.search(line) and path != Path(__file__).resolve()):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_the_path_check_can_fail():
    assert MACHINE_PATH.search('open("/home/someone/data")') and not MACHINE_PATH.search("/usr/local/cuda/bin")


def test_csrc_knows_neither_torch_nor_pybind11_outside_bindings():
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".cpp", ".cu", ".h", ".cuh"):
            includes = " ".join(re.findall(r'#include\s*[<"]([^>"]+)', path.read_text()))
            assert not re.search(r"\b(torch|ATen|c10)/", includes), path
            assert "pybind11" not in includes or path.name == "bindings.cpp", path

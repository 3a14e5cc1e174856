"""Makes the references importable, runs them in either precision, and reports how far apart we are.

k-diffusion and CompVis' code are imported without most of what they ask for: samplers, losses and
networks need torch and einops alone, and what serves only pictures and training scripts is replaced
by empty modules. torchvision, which PyPI builds for CUDA, lacks two of its operators beside a torch
without CUDA, and does not start unless they are declared.
"""

import gc
import importlib
import importlib.util
import os
import sys
import types
from collections import defaultdict
from pathlib import Path
from unittest import mock

# Hundreds of small programs, each run once: compiling them is all the time that the suite takes.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 " + os.environ.get("XLA_FLAGS", "")

import jax
import numpy as np
import pytest
import torch

_OPERATORS = torch.library.Library("torchvision", "DEF")
_OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_OPERATORS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import diffusers  # noqa: E402
import diffusers.training_utils  # noqa: E402  it must not meet the empty modules below
import torchvision  # noqa: E402, F401  nor must this

# As in tests/conftest.py.
gc.freeze()
gc.set_threshold(20_000, 10, 10)

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}

torch.set_num_threads(1)

# torch-fidelity installs a package of this name.
_TESTS = types.ModuleType("tests")
_TESTS.__path__ = [str(Path(__file__).parents[1] / "tests")]
sys.modules["tests"] = _TESTS


class _LightningModule(torch.nn.Module):
    device = torch.device("cpu")


def _stand_in(name: str, **attributes) -> None:
    module = types.ModuleType(name)
    module.__getattr__ = lambda attribute: mock.MagicMock(name=f"{name}.{attribute}")
    for attribute, value in attributes.items():
        setattr(module, attribute, value)
    sys.modules[name] = module


def _import_references() -> list[types.ModuleType]:
    before = dict(sys.modules)
    _stand_in("pytorch_lightning", LightningModule=_LightningModule)
    for name in (
        *("pytorch_lightning.utilities", "pytorch_lightning.utilities.distributed"),
        *("torchvision", "torchvision.utils", "torchvision.transforms"),
        *("dctorch", "omegaconf", "torchdiffeq", "torchsde"),
    ):
        _stand_in(name)
    stand_ins = {n for n, module in sys.modules.items() if before.get(n) is not module}
    # The package's own __init__ imports all of its training code.
    package = types.ModuleType("k_diffusion")
    package.__path__ = importlib.util.find_spec("k_diffusion").submodule_search_locations
    sys.modules["k_diffusion"] = package
    names = (
        *("k_diffusion.sampling", "k_diffusion.external", "k_diffusion.layers"),
        *("ldm.models.diffusion.ddpm", "ldm.models.diffusion.ddim", "ldm.models.diffusion.plms"),
        *("ldm.models.diffusion.dpm_solver.sampler", "ldm.models.diffusion.dpm_solver.dpm_solver"),
    )
    modules = [importlib.import_module(name) for name in names]
    for name in stand_ins:
        del sys.modules[name]
    sys.modules.update({name: before[name] for name in stand_ins & before.keys()})
    _stand_in("omegaconf.listconfig")  # CompVis' UNet asks it for a type whenever it is made
    return modules


_REFERENCES = _import_references()

# diffusers imports a scheduler when it is first asked for.
_SCHEDULERS = (
    *("DDIM", "DDIMInverse", "DDPM", "PNDM", "LCM", "DPMSolverMultistep", "UniPCMultistep"),
    *("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete"),
    *("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"),
)
_REFERENCES += [sys.modules[getattr(diffusers, f"{n}Scheduler").__module__] for n in _SCHEDULERS]


class _Wide:
    """A module whose float32 is double: the references name their precision in many places."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, "float64" if name == "float32" else name)


@pytest.fixture(params=["float32", "float64"])
def dtype(request, monkeypatch):
    """The precision in which both sides run. Ours follows its input."""
    if request.param == "float32":
        yield np.dtype("float32")
        return
    for module in _REFERENCES:
        for name in {"torch", "np"} & vars(module).keys():
            monkeypatch.setattr(module, name, _Wide(getattr(module, name)))
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        yield np.dtype("float64")
    torch.set_default_dtype(torch.float32)


_DIFFERENCES = defaultdict(dict)


@pytest.fixture
def agree(request):
    """`agree(ours, theirs)` asserts that the two are as near as their precision asks.

    The difference is the largest of all elements, in units of the largest of theirs where that is
    above 1. The session ends with a table of them.
    """
    params = getattr(request.node, "callspec", types.SimpleNamespace(params={})).params
    precision = str(params.get("dtype", "float32"))
    parts = (str(value) for name, value in params.items() if name not in ("dtype", "steps"))
    row = " ".join([request.node.originalname.removeprefix("test_"), *parts])

    def check(ours, theirs, tolerance=None):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert ours.shape == theirs.shape
        difference = float(np.max(np.abs(ours - theirs)) / max(1.0, np.max(np.abs(theirs))))
        seen = _DIFFERENCES[row].get(precision, 0.0)
        _DIFFERENCES[row][precision] = max(seen, difference)
        assert difference <= (tolerance or TOLERANCE[precision])

    return check


_ERRORS = defaultdict(dict)
MEASURED = ("layers", "outputs", "gradients")


@pytest.fixture
def near(request):
    """`near(measured, ours, theirs, tolerance)` asserts ‖ours − theirs‖ ≤ tolerance·‖theirs‖.

    Both are arrays by name, and each is to be near. `measured` is one of `MEASURED`; the session
    ends with a table of the worst of each.
    """
    row = request.node.name.removeprefix("test_")

    def check(measured, ours, theirs, tolerance):
        assert ours.keys() == theirs.keys()
        errors = {}
        for name, reference in theirs.items():
            assert ours[name].shape == reference.shape, name
            difference = np.linalg.norm(np.float64(ours[name]) - reference)
            error = difference / np.linalg.norm(np.float64(reference))
            errors[name] = float(np.nan_to_num(error, nan=np.inf))
        worst = max(errors, key=errors.get)
        _ERRORS[row][measured] = max(errors[worst], _ERRORS[row].get(measured, 0.0))
        assert errors[worst] <= tolerance, f"{worst}: {errors[worst]:.1e}"

    return check


def pytest_sessionfinish(session):
    """What a worker of pytest-xdist measured goes to the process that prints the tables."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["measured"] = [dict(_DIFFERENCES), dict(_ERRORS)]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    for mine, theirs in zip((_DIFFERENCES, _ERRORS), node.workeroutput["measured"], strict=True):
        for row, found in theirs.items():
            mine[row] |= {key: max(value, mine[row].get(key, 0.0)) for key, value in found.items()}


def pytest_terminal_summary(terminalreporter):
    """The tables of differences and errors."""
    tables = {
        "largest differences from the references": (_DIFFERENCES, TOLERANCE),
        f"relative errors of {', '.join(MEASURED)}": (_ERRORS, MEASURED),
    }
    for title, (rows, columns) in tables.items():
        if rows:
            terminalreporter.section(title)
        for row, found in rows.items():
            cells = (f"{found[c]:9.1e}" if c in found else " " * 9 for c in columns)
            terminalreporter.write_line(f"{row:60}" + "  ".join(cells))

"""The CPU flag is set where it is known, and only there."""

from importlib import metadata

import pytest

from ldm_jax.runtime import cpu

INSTALLED = metadata.version("jaxlib")


def test_this_jaxlib_was_measured():
    """Red with a new one: run `python -m benchmarks.unet` with and without the flag."""
    assert tuple(int(part) for part in INSTALLED.split(".")[:2]) in cpu.PAYS


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_other=1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(cpu.metadata, "version", lambda name: "0.10.2")


def test_appends_to_the_users_flags(monkeypatch):
    assert cpu.use_fast_cpu_kernels()
    assert cpu.os.environ["XLA_FLAGS"] == f"--xla_other=1 {cpu.FLAG}"


def test_leaves_the_users_own_choice(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"{cpu.FLAG}1")
    assert not cpu.use_fast_cpu_kernels()


@pytest.mark.parametrize("version", ["0.9.9", "0.11.0", "0.12.0", "0.99.0"])
def test_a_jaxlib_that_does_not_gain_is_left_alone(monkeypatch, version):
    monkeypatch.setattr(cpu.metadata, "version", lambda name: version)
    assert not cpu.use_fast_cpu_kernels()


def test_an_accelerator_is_left_alone(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda name: name == "libtpu")
    assert not cpu.use_fast_cpu_kernels()

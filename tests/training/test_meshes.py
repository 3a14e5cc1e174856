"""Both stages train, draw, are measured and exported on meshes as on one device."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from ldm_jax.runtime import mesh as meshes
from ldm_jax.training import loop
from tests.training.tiny import config

MESHES = {"data": (8, 1, 1), "fsdp": (2, 4, 1), "tensor": (2, 2, 2)}


def one_device(axes):
    device = np.reshape(jax.devices()[:1], (1, 1, 1))
    types = (jax.sharding.AxisType.Auto,) * 3
    return jax.sharding.Mesh(device, meshes.AXES, axis_types=types)


def trained(stage, workdir, axes=None):
    """(losses, held-out metrics, weights, the shardings of the parameters) of 20 steps."""
    changed, seen = config(stage), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "MIN_SPLIT_SIZE", 64)  # all but the smallest are split
        if axes is None:
            patch.setattr(loop, "make_mesh", one_device)
        else:
            changed.mesh = dict(zip(meshes.AXES, axes, strict=True))
        save = loop.Checkpoints.save

        def look(checkpoints, step, state, about):
            seen.append({leaf.sharding.spec for leaf in jax.tree.leaves(state.params)})
            save(checkpoints, step, state, about)

        patch.setattr(loop.Checkpoints, "save", look)
        held_out = loop.train(changed, workdir)
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    return losses, held_out, load_file(workdir / "model.safetensors"), seen[-1]


@pytest.fixture(scope="module")
def on_one(tmp_path_factory):
    """on_one(stage): trained on one device, once."""
    done = {}

    def get(stage):
        if stage not in done:
            done[stage] = trained(stage, tmp_path_factory.mktemp(stage))
        return done[stage]

    return get


@pytest.mark.parametrize(
    "stage, mesh",
    [
        pytest.param(stage, mesh, marks=() if (stage, mesh) == SHORT else pytest.mark.long)
        for SHORT in [("diffusion", "tensor")]
        for stage in ("diffusion", "autoencoder")
        for mesh in MESHES
    ],
)
def test_a_mesh_trains_as_one_device_does(on_one, tmp_path, stage, mesh):
    losses, held_out, weights, _ = on_one(stage)
    same, measured, exported, specs = trained(stage, tmp_path, MESHES[mesh])
    split = {axis for spec in specs for axis in jax.tree.leaves(tuple(spec))}
    assert split == {"data": set(), "fsdp": {"fsdp"}, "tensor": {"fsdp", "tensor"}}[mesh]
    assert len(losses) == 20
    np.testing.assert_allclose(same, losses, rtol=1e-5)
    assert measured.keys() == held_out.keys()
    for name in held_out:
        np.testing.assert_allclose(measured[name], held_out[name], rtol=1e-3)
    assert exported.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_allclose(exported[name], value, atol=1e-3)
    assert (tmp_path / "previews" / "0000020.png").exists()

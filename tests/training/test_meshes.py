"""Both stages train, draw, are measured and exported on meshes as on one device."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ldm_jax.runtime import mesh as meshes
from ldm_jax.training import loop
from tests.training.least_squares import Task, reports, steps
from tests.training.tiny import config as tiny_config

MESHES = {"data": (8, 1, 1), "fsdp": (2, 4, 1), "tensor": (2, 2, 2)}


def one_device(axes):
    device = np.reshape(jax.devices()[:1], (1, 1, 1))
    types = (jax.sharding.AxisType.Auto,) * 3
    return jax.sharding.Mesh(device, meshes.AXES, axis_types=types)


def trained(stage, workdir, axes=None):
    """(losses, held-out metrics, weights, the shardings of the parameters) of 20 steps."""
    changed, seen = tiny_config(stage), []
    changed.optimizer.lr = 3e-4  # Adam makes steps of rounding errors where there is no gradient
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "MIN_SPLIT_SIZE", 64)  # all but the smallest are split
        if axes is None:
            patch.setattr(loop, "make_mesh", one_device)
        else:
            changed.mesh = dict(zip(meshes.AXES, axes, strict=True))
        save = loop.Checkpoints.save

        def look(checkpoints, step, state, *others, **options):
            seen.append({leaf.sharding.spec for leaf in jax.tree.leaves(state.params)})
            save(checkpoints, step, state, *others, **options)

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


class TwoLayers(Task):
    """A pair of layers with the names of an attention block's, which `tensor` splits."""

    def init(self, key, loaded):
        names = {"to_q": (3, 16), "to_out": (16, 8)}
        return {
            "net": {
                name: {"kernel": jax.random.normal(jax.random.fold_in(key, shape[0]), shape)}
                for name, shape in names.items()
            }
        }

    def gradients(self, params, frozen, batch, key, phase):
        def loss(params):
            net = params["net"]
            hidden = jnp.tanh(batch["x"] @ net["to_q"]["kernel"])
            return jnp.mean(jnp.square(hidden @ net["to_out"]["kernel"] - 1.0))

        value, grads = jax.value_and_grad(loss)(params)
        return grads, {"loss": value}


def test_a_run_goes_on_on_other_meshes(use, tmp_path, monkeypatch):
    """The state is split differently at each start, and the losses are those of one device."""
    monkeypatch.setattr(meshes, "MIN_SPLIT_SIZE", 16)
    use(TwoLayers())
    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_mesh", one_device)
        loop.train(steps(30), tmp_path / "one")
    places = []
    save = loop.Checkpoints.save

    def look(checkpoints, step, state, *others, **options):
        places.append(
            [tuple(state.ema["net"][n]["kernel"].sharding.spec) for n in ("to_q", "to_out")]
        )
        save(checkpoints, step, state, *others, **options)

    monkeypatch.setattr(loop.Checkpoints, "save", look)
    for end, axes in ((10, MESHES["tensor"]), (20, MESHES["fsdp"]), (30, MESHES["data"])):
        sizes = {f"mesh.{name}": size for name, size in zip(("data", "fsdp"), axes, strict=False)}
        config = steps(end, **sizes)
        config.mesh.tensor = axes[2]
        loop.train(config, tmp_path / "many")
    assert places == [[(None, "tensor"), ("tensor", "fsdp")], [(None, "fsdp"), ("fsdp",)], [(), ()]]
    one, many = reports(tmp_path / "one"), reports(tmp_path / "many")
    assert [line["step"] for line in many] == [line["step"] for line in one]
    np.testing.assert_allclose([a["loss"] for a in many], [a["loss"] for a in one], rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("stage", ["diffusion", "autoencoder"])
@pytest.mark.parametrize("mesh", MESHES)
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
        # A bias before a norm has a gradient of rounding errors, and Adam makes steps of them.
        tolerance = 1e-2 if name.endswith("bias") else 1e-3
        np.testing.assert_allclose(exported[name], value, atol=tolerance, err_msg=name)
    assert (tmp_path / "previews" / "0000020.png").exists()

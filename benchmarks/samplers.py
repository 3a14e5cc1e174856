"""Every sampler's error against its cost, on data with a known exact solution.

    pip install matplotlib scipy && python -m benchmarks.samplers

writes docs/pictures/samplers.png and the table between the markers of docs/samplers.md. The data
is the mixture of two Gaussians of tests/diffusion/closed_form.py, the schedule Stable Diffusion's,
the grid Karras's. Deterministic samplers are measured by their distance to the exact solution of
the probability-flow ODE from the same noise; those that draw noise by the distance of what they
draw, sorted, to the data's quantiles (Wasserstein-1), whose floor is that of as many true samples.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from ldm_jax.diffusion.grids import sampling_grid
from ldm_jax.diffusion.noise import example_keys
from ldm_jax.diffusion.samplers import SAMPLERS, get_sampler, make_table, sample
from ldm_jax.diffusion.schedule import make_schedule
from tests.diffusion.closed_form import exact_map, mixture

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parents[1]
SCHEDULE = make_schedule("linear", 1000, 0.00085, 0.012)
EVALUATIONS = (6, 10, 16, 24, 40, 64, 100, 160)
SAMPLES = 1 << 17
CLEAN = (1.0, 1e-9)
MARKERS = "<!-- table -->\n", "<!-- /table -->\n"
SECOND_ORDER = {"plms", "heun", "lms", "dpmpp_2s_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "unipc"}
ORDER = {name: 1 for name in SAMPLERS} | {n: 2 for n in SECOND_ORDER | {"flow_heun"}}
ORDER["dpmpp_3m_sde"] = 3
ADVICE = {
    "ddim": "the default; inversion; η between 0 and 1 where some noise helps",
    "ddpm": "all T steps, as the model was trained",
    "plms": "the default of the first Stable Diffusion",
    "euler": "DDIM under another name; with churn, Karras et al.'s stochastic sampler",
    "euler_ancestral": "DDIM with η = 1 under another name; varied pictures at 20–40 steps",
    "heun": "few, accurate steps; with churn, Karras et al.'s best",
    "lms": "smooth models and even grids; unstable on coarse ones",
    "dpmpp_2s_ancestral": "varied pictures, more accurate than Euler ancestral",
    "dpmpp_2m": "the best choice for 10–30 steps",
    "dpmpp_2m_sde": "varied pictures at 20–50 steps",
    "dpmpp_3m_sde": "varied pictures from 40 steps on",
    "unipc": "the most accurate for 5–15 steps",
    "lcm": "consistency-distilled models only, 1–8 steps, spacing lcm",
    "flow_euler": "flow models; DDIM under another name",
    "flow_heun": "flow models, and models whose last timestep has no signal",
    "meanflow": "MeanFlow models only, 1–4 steps",
}


def run(name: str, noise: jax.Array, evaluations: int, **options: float) -> tuple:
    """(end, start, levels) of a sampler with so many network evaluations."""
    steps = max(1, evaluations // SAMPLERS[name].evaluations)
    levels = sampling_grid(SCHEDULE, steps, "karras")
    table = make_table(name, SCHEDULE, levels, **options)
    keys = example_keys(jax.random.key(1), len(noise))
    start = noise * np.hypot(levels.alpha[0], levels.sigma[0])
    draw = jax.jit(lambda x, table: sample(get_sampler(name), mixture, x, table, keys))
    return np.asarray(draw(start, table)), np.asarray(start), levels


def path_error(name: str, evaluations: int) -> float:
    """Root of the mean square distance to the exact end of the same path."""
    noise = jax.random.normal(jax.random.key(0), (1, 4096, 1, 1), jnp.float64)
    options = {"eta": 0.0} if "eta" in SAMPLERS[name].options else {}
    end, start, levels = run(name, noise, evaluations, **options)
    exact = exact_map(start, (levels.alpha[0], levels.sigma[0]), CLEAN)
    return float(np.sqrt(np.mean((end - exact) ** 2)))


def law_error(name: str, evaluations: int) -> float:
    """Wasserstein-1 distance of the samples to the data."""
    noise = jax.random.normal(jax.random.key(0), (16, SAMPLES // 16, 1, 1), jnp.float64)
    end, _, _ = run(name, noise, evaluations)
    return float(np.mean(np.abs(np.sort(end.ravel()) - quantiles())))


def quantiles() -> np.ndarray:
    """Quantiles of the data, at the middles of SAMPLES equal parts."""
    from scipy.special import ndtri

    unit = ndtri((np.arange(SAMPLES) + 0.5) / SAMPLES)
    return exact_map(unit * 1e4, (0.0, 1e4), CLEAN)


def draws_noise(name: str) -> bool:
    options = SAMPLERS[name].options
    return name in ("ddpm", "lcm") or options.get("eta", 0.0) > 0.0


def table() -> str:
    rows = [
        "| sampler | order | evaluations per step | adds noise | options | recommended for |",
        "|---" * 6 + "|",
    ]
    for name, sampler in SAMPLERS.items():
        noise = "yes" if draws_noise(name) else "if η > 0" if "eta" in sampler.options else "no"
        if "churn" in sampler.options:
            noise = "with churn"
        options = ", ".join(f"`{k}` {v:g}" for k, v in sampler.options.items()) or "–"
        row = (
            f"`{name}`",
            str(ORDER[name]),
            str(sampler.evaluations),
            noise,
            options,
            ADVICE[name],
        )
        rows.append("| " + " | ".join(row) + " |")
    return "\n".join(rows) + "\n"


def main():
    jax.config.update("jax_enable_x64", True)
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), sharex=True)
    styles = [f"{marker}{line}" for line in ("-", "--") for marker in "osv^Dx"]
    same = ("euler", "flow_euler", "euler_ancestral")  # as ddim and ddpm
    kinds = [
        (path_error, "distance to the exact path", [
            n for n in SAMPLERS if n not in ("ddpm", "lcm", "meanflow", *same)
        ]),
        (law_error, "distance to the data's distribution", [
            n for n in SAMPLERS if draws_noise(n) and n not in ("lcm", *same)
        ]),
    ]  # fmt: skip
    for panel, (error, label, names) in zip(panels, kinds, strict=True):
        for name, style in zip(names, styles, strict=False):
            errors = [error(name, count) for count in EVALUATIONS]
            print(f"{name:20s}", " ".join(f"{e:9.2e}" for e in errors))
            alone = error is path_error and draws_noise(name)
            panel.loglog(EVALUATIONS, errors, style, ms=4, lw=1.2,
                         label=f"{name}, η = 0" if alone else name)  # fmt: skip
        panel.set(xlabel="network evaluations", ylabel=label)
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=7)
    panels[0].set_title("from the same noise: the ODE", fontsize=10)
    panels[1].set_title(f"{SAMPLES:,} draws: the SDE", fontsize=10)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "pictures" / "samplers.png", dpi=110)

    page = ROOT / "docs" / "samplers.md"
    before, rest = page.read_text().split(MARKERS[0])
    page.write_text(before + MARKERS[0] + table() + MARKERS[1] + rest.split(MARKERS[1])[1])


if __name__ == "__main__":
    main()

"""Makes the statistics of a set of pictures once, as a reference for evaluate.py.

    python -m ldm_jax.statistics --source=folder --path=PICTURES --image_size=256 \\
        --extractor=pt_inception-2015-12-05-6726825d.pth --out=reference.npz
    python evaluate.py --model=runs/mine --extractor=pt_inception-2015-12-05-6726825d.pth \\
        --reference=reference.npz

The file has `mu` and `sigma` as pytorch-fid and clean-fid read and write them, and `protocol`,
which names the extractor, its hash and resize, and the pictures' count and hash: evaluate.py
refuses a reference of another extractor or resize.
"""

import json

import ml_collections
from absl import flags
from tqdm import tqdm

from ldm_jax.data.sources import SOURCES, open_source, sample
from ldm_jax.metrics.extractors import load_extractor
from ldm_jax.metrics.reference import describe, measure, write_statistics
from ldm_jax.metrics.resizing import RESIZES
from ldm_jax.runtime.compile_cache import use_compile_cache
from ldm_jax.runtime.console import run

SOURCE = flags.DEFINE_enum("source", "folder", list(SOURCES), "What the pictures are.")
PATH = flags.DEFINE_string("path", "", "Folder or name of that source.")
SPLIT = flags.DEFINE_enum("split", "train", ["train", "held_out", "all"], "Which of its pictures.")
IMAGE_SIZE = flags.DEFINE_integer("image_size", None, "Side of the squares, pixels.", 1)
EXTRACTOR = flags.DEFINE_string("extractor", "", "File of a network; empty: EfficientNet-Lite0.")
RESIZE = flags.DEFINE_enum("resize", "", ["", *RESIZES], "Empty: the extractor's own.")
OUT = flags.DEFINE_string("out", None, "The .npz file to write.")
flags.mark_flags_as_required(["image_size", "out"])


def main():
    use_compile_cache()
    extract = load_extractor(EXTRACTOR.value, RESIZE.value)
    asked = dict(source=SOURCE.value, path=PATH.value, image_size=IMAGE_SIZE.value)
    source = sample(open_source(ml_collections.ConfigDict(asked), SPLIT.value))
    images = (source[i]["image"] for i in tqdm(range(len(source)), dynamic_ncols=True))
    about = dict(source=SOURCE.value, path=PATH.value, split=SPLIT.value)
    reference = measure(extract, images, about, keep=False)
    write_statistics(OUT.value, reference, extract)
    shown = {"reference": reference.about, "extractor": describe(extract)}
    print(json.dumps(shown, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    run(main)

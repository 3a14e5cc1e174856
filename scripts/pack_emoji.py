"""Packs Noto emoji and their CLDR names into `ldm_jax/data/emoji.zip`, the embedded data set.

    npm pack emoji-datasource-google@16.0.0 emojibase-data@17.0.0
    python scripts/pack_emoji.py DIRECTORY_WITH_THE_TWO_TGZ_FILES

Pictures: Noto emoji, Google, Apache-2.0, 64 px, from emoji-datasource-google (MIT). Names, tags
and groups: Unicode CLDR through emojibase-data (MIT). Skin-tone variants and the five bare
components (skin tones) are left out.

The zip holds, uncompressed so that opening it costs one decode,
- `sheet.webp`: lossless RGBA contact sheet, 44 tiles of 64×64 a row, in the order of the list
  below;
- `emoji.json`: `{"groups": [...], "emoji": [{"name", "tags", "group", "hexcode", "held_out"},
  ...]}` in Unicode's order; `name` is the caption and unique, `group` indexes `groups`;
- `LICENSES.txt`.

The same packages and Pillow write the same bytes.
"""

import argparse
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from ldm_jax.data.emoji import EMOJI_COLUMNS, EMOJI_SIZE, EMOJI_ZIP
from ldm_jax.data.splits import is_held_out

PICTURES = "emoji-datasource-google-16.0.0.tgz"
NAMES = "emojibase-data-17.0.0.tgz"
COMPONENTS = "component"
HELD_OUT = 0.1
LICENSES = """\
sheet.webp: Noto emoji, Copyright Google Inc., Apache License 2.0
  https://github.com/googlefonts/noto-emoji/blob/main/LICENSE
  taken from the npm package emoji-datasource-google 16.0.0 (MIT, Copyright (c) 2013 Cal Henderson)
emoji.json: names, tags and groups of the Unicode CLDR (Unicode License v3)
  taken from the npm package emojibase-data 17.0.0 (MIT, Copyright (c) 2017-2019 Miles Johnson)
"""


def read_members(path: Path, wanted) -> dict[str, bytes]:
    """Contents of the regular files of a .tgz whose name `wanted(name)` accepts."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; see the docstring of this script")
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar if m.isfile() and wanted(m.name)}


def join_key(hexcode: str) -> str:
    """The two packages differ in leading zeros and in the emoji presentation selector FE0F."""
    return "-".join(part.lstrip("0") for part in hexcode.lower().split("-") if part != "fe0f")


def read_emoji(directory: Path) -> tuple[list[str], list[dict], np.ndarray]:
    """Groups, one record per emoji in Unicode's order, and the pictures uint8 (N, 64, 64, 4)."""
    prefix = f"package/img/google/{EMOJI_SIZE}/"
    pictures = read_members(
        directory / PICTURES, lambda n: n == "package/emoji.json" or n.startswith(prefix)
    )
    names = read_members(
        directory / NAMES, lambda n: n in ("package/en/data.json", "package/en/messages.json")
    )
    groups = json.loads(names["package/en/messages.json"])["groups"]
    kept = {g["order"]: g["message"] for g in groups if g["key"] != COMPONENTS}
    labels = list(kept.values())
    index = dict(zip(kept, range(len(kept)), strict=True))

    # Skin tones sit in nested lists in both packages, so the top level is exactly the base emoji.
    files = {
        join_key(e["unified"]): prefix + e["image"]
        for e in json.loads(pictures["package/emoji.json"])
        if e["has_img_google"]
    }
    records, images = [], []
    for entry in sorted(
        json.loads(names["package/en/data.json"]), key=lambda e: e.get("order", 1 << 30)
    ):
        file = files.get(join_key(entry["hexcode"]))
        if file is None or entry.get("group") not in index:
            continue
        name = entry["label"]
        tags = [t for t in dict.fromkeys(entry.get("tags", [])) if t != name]
        records.append(
            {
                "name": name,
                "tags": tags,
                "group": index[entry["group"]],
                "hexcode": entry["hexcode"],
                "held_out": is_held_out(name, HELD_OUT),
            }
        )
        images.append(np.asarray(Image.open(io.BytesIO(pictures[file])).convert("RGBA")))
    if len({r["name"] for r in records}) != len(records):
        raise ValueError("two emoji share a name; names must be unique")
    return labels, records, np.stack(images)


def contact_sheet(images: np.ndarray) -> bytes:
    """Lossless WebP of (N, 64, 64, 4) tiles, row by row; colours under zero alpha become black."""
    rows = -(-len(images) // EMOJI_COLUMNS)
    tiles = np.zeros((rows * EMOJI_COLUMNS, *images.shape[1:]), np.uint8)
    tiles[: len(images)] = np.where(images[..., 3:] > 0, images, 0)
    sheet = tiles.reshape(rows, EMOJI_COLUMNS, *images.shape[1:]).swapaxes(1, 2)
    sheet = sheet.reshape(rows * EMOJI_SIZE, EMOJI_COLUMNS * EMOJI_SIZE, 4)
    out = io.BytesIO()
    Image.fromarray(sheet).save(out, "WEBP", lossless=True, exact=True, quality=75, method=4)
    return out.getvalue()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--out", type=Path, default=EMOJI_ZIP)
    args = parser.parse_args()
    groups, records, images = read_emoji(args.directory)
    lines = ",\n".join(json.dumps(r, ensure_ascii=False) for r in records)
    head = json.dumps(groups, ensure_ascii=False)
    members = {
        "emoji.json": f'{{"groups": {head}, "emoji": [\n{lines}\n]}}\n'.encode(),
        "sheet.webp": contact_sheet(images),
        "LICENSES.txt": LICENSES.encode(),
    }
    with zipfile.ZipFile(args.out, "w", zipfile.ZIP_STORED) as out:
        for name, data in members.items():
            # A fixed date, so that packing again gives the same file.
            out.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), data)
    held = sum(r["held_out"] for r in records)
    size = args.out.stat().st_size / 1e6
    print(f"{args.out}: {size:.2f} MB, {len(records)} emoji, {held} held out")


if __name__ == "__main__":
    main()

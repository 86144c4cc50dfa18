"""Captions for photos of a subject: python scripts/caption.py PHOTOS --class_word dog

A vision-language model describes everything but the subject, which the identifier names. A caption is written
in a .txt file beside each photo that has none; files that are there are never changed. Leaves a contact sheet
of all photos with their captions: read it, correct the files by hand, train with data.params.captions=true.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed
from ldm.contact_sheet import contact_sheet, save_image
from ldm.data.images import list_images, load_image
from ldm.data.prompts import PRIOR_TEMPLATE, SUBJECT_TEMPLATE, check_prompts, fill
from ldm.errors import UserError
from ldm.evaluation.captions import ASKED, question, write_captions
from ldm.evaluation.vision_language import GEMMA, SMOL, VisionLanguageModel
from ldm.files import make_folder

SIDE = 320  # pixels of a photo on the sheet


def parse(words: Sequence[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("photos", type=Path, help="folder of photos")
    add("--class_word", required=True, help="what the subject is, such as dog")
    add("--identifier", default="sks", help="the rare word that names it (sks)")
    add("--model", help=f"folder or hub name ({GEMMA} where a GPU has 30 GiB, else {SMOL})")
    add("--style", choices=ASKED, default="sentence", help="a phrase, or tags with commas (sentence)")
    add("--language", default="English", help="of the description (English)")
    add("--batch_size", type=int, default=4, help="photos at a time (4)")
    add("--device", help="where to compute (the GPU where there is one)")
    add("--skip_unreadable", action="store_true", help="skip images that cannot be decoded")
    add("--out", type=Path, help="the contact sheet (logs/captions-NAME.png)")
    return parser.parse_args(words)


def main(options: argparse.Namespace) -> Path:
    words = {"identifier": options.identifier, "class_word": options.class_word}
    subject, of_class = (fill(template, **words) for template in (SUBJECT_TEMPLATE, PRIOR_TEMPLATE))
    check_prompts(**words, subject_prompt=subject, prior_prompt=of_class)
    if options.batch_size < 1:
        raise UserError("There is nothing to do", where="--batch_size", remedy="Choose 1 or more.")
    paths = list_images(options.photos, skip_unreadable=options.skip_unreadable)
    kept = [path for path in paths if path.with_suffix(".txt").exists()]
    if kept:
        print(f"{len(kept)} of {len(paths)} photos have a caption, which stays")
    if len(kept) < len(paths):
        model = VisionLanguageModel(options.model, device=options.device)
        asked = question(options.class_word, style=options.style, language=options.language)
        how = {"asked": asked, "subject": subject, "style": options.style, "batch_size": options.batch_size}
        with tqdm(total=len(paths) - len(kept), desc="captions", unit="photo") as bar:
            for path, caption in write_captions(paths, model, **how):
                bar.write(f"{path.with_suffix('.txt')}: {caption}")
                bar.update()
    rows = []
    for path in paths:
        image = load_image(path)
        image.thumbnail((SIDE, SIDE))
        caption = path.with_suffix(".txt").read_text(encoding="utf-8-sig")
        rows.append((f"{path.name}: {' '.join(caption.split())}", [image]))
    out = options.out or Path("logs", f"captions-{options.photos.resolve().name}.png")
    if out.resolve().parent == options.photos.resolve():
        remedy = "Choose another folder: there it would be taken for a photo."
        raise UserError("The contact sheet would lie among the photos", where=out, remedy=remedy)
    make_folder(out.parent)
    return save_image(out, contact_sheet(rows, cell=1), {"prompts": [caption for caption, _ in rows]})


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        print(main(parse(sys.argv[1:])))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

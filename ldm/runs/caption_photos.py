"""Captions for photos of a subject, by a vision-language model: what `caption.py` does."""

from argparse import Namespace
from pathlib import Path

from tqdm import tqdm

from ldm.contact_sheet import contact_sheet, save_image
from ldm.data.images import list_images, load_image
from ldm.data.prompts import PRIOR_TEMPLATE, SUBJECT_TEMPLATE, check_prompts, fill, read_text
from ldm.errors import UserError
from ldm.evaluation.captions import question, write_captions
from ldm.evaluation.vision_language import VisionLanguageModel
from ldm.files import make_folder

SIDE = 320  # pixels of a photo on the sheet


def caption_photos(options: Namespace) -> Path:
    """Writes captions for the photos that have none -> the contact sheet of all."""
    words = {"identifier": options.identifier, "class_word": options.class_word}
    subject, of_class = (fill(template, **words) for template in (SUBJECT_TEMPLATE, PRIOR_TEMPLATE))
    check_prompts(**words, subject_prompt=subject, prior_prompt=of_class)
    if options.batch_size < 1:
        raise UserError("There is nothing to do", where="--batch_size", remedy="Choose 1 or more.")
    out = options.out or Path("logs", f"captions-{options.photos.resolve().name}.png")
    if out.resolve().parent == options.photos.resolve():
        remedy = "Choose another folder: there it would be taken for a photo."
        raise UserError("The contact sheet would lie among the photos", where=out, remedy=remedy)
    paths = list_images(options.photos, skip_unreadable=options.skip_unreadable)
    kept = [path for path in paths if path.with_suffix(".txt").exists()]
    for path in kept:
        read_text(path.with_suffix(".txt"))
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
        caption = read_text(path.with_suffix(".txt"))
        rows.append((f"{path.name}: {' '.join(caption.split())}", [image]))
    make_folder(out.parent)
    return save_image(out, contact_sheet(rows, cell=1), {"prompts": [caption for caption, _ in rows]})

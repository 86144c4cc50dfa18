"""Captions for photos of a subject, by a vision-language model: what `caption.py` does."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ldm.contact_sheet import contact_sheet, save_image
from ldm.data.captions import CaptionReader
from ldm.data.images import list_images, load_image
from ldm.data.prompts import PRIOR_TEMPLATE, SUBJECT_TEMPLATE, Words, check_prompts, fill
from ldm.errors import UserError
from ldm.evaluation.captions import question, without_caption, write_captions
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
    todo = without_caption(paths)
    kept = [path for path in paths if path not in todo]
    captions_of(kept, options.photos, words)  # refuses what cannot be filled in
    if kept:
        print(f"{len(kept)} of {len(paths)} photos have a caption, which stays")
    if todo:
        model = VisionLanguageModel(options.model, device=options.device)
        asked = question(options.class_word, style=options.style, language=options.language)
        how = {"subject": subject, "class_word": options.class_word, "style": options.style}
        how |= {"asked": asked, "batch_size": options.batch_size}
        with model.placed(), tqdm(total=len(todo), desc="captions", unit="photo") as bar:
            for path, caption in write_captions(todo, model, **how):
                bar.write(f"{path.with_suffix('.txt')}: {caption}")
                bar.update()
    rows = []
    for path, caption in captions_of(paths, options.photos, words).items():
        image = load_image(path)
        image.thumbnail((SIDE, SIDE))
        rows.append((f"{path.name}: {caption}", [image]))
    make_folder(out.parent)
    return save_image(out, contact_sheet(rows, cell=1), {"prompts": [caption for caption, _ in rows]})


def captions_of(paths: Sequence[Path], folder: Path, words: Words) -> dict[Path, str]:
    """Photo of a folder, which has captions -> these, as training reads them. Raises UserError."""
    read = CaptionReader(True, folder, words)
    return {path: " | ".join(read(path).texts) for path in paths}

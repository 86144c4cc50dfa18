"""Captions for photos of a subject: caption.py PHOTOS --class_word dog

A vision-language model describes everything but the subject, which the identifier names. A caption is written
in a .txt file beside each photo that has none of its own: in a file (.txt, .caption, .json) or a line of the
folder's metadata.jsonl, which are never changed. Leaves a contact sheet of all photos with their captions:
read it, correct the files by hand, train with data.params.captions=true.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ldm.commands.entry import one_of, parser_of, run


def parse(words: Sequence[str] | None = None) -> Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("photos", type=Path, help="folder of photos")
    add("--class_word", required=True, help="what the subject is, such as dog")
    add("--identifier", default="sks", help="the rare word that names it (sks)")
    add("--model", help="folder or hub name (Gemma 3 12B where a GPU has 30 GiB, else SmolVLM-500M)")
    styles = one_of("ldm.evaluation.captions:ASKED")
    add(
        "--style",
        type=styles,
        default="sentence",
        help="sentence: one phrase, or tags: a list with commas (sentence)",
    )
    add("--language", default="English", help="of the description (English)")
    add("--batch_size", type=int, default=4, help="photos at a time (4)")
    add("--device", help="where to compute (the GPU where there is one)")
    add("--skip_unreadable", action="store_true", help="skip images that cannot be decoded")
    add("--out", type=Path, help="the contact sheet (logs/captions-NAME.png)")
    return parser.parse_args(words)


def main(options: Namespace) -> Path:
    """Writes the captions -> the contact sheet."""
    from ldm.runs.caption_photos import caption_photos

    return caption_photos(options)


def command() -> int:
    return run(lambda: print(main(parse())))

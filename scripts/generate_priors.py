"""Generate the prior images of a config, and nothing else: the same set that main.py would use.

    python scripts/generate_priors.py --base configs/dreambooth.yaml [key.sub=value ...]

Under torchrun, or with `trainer.devices=N`, the images are divided among the processes.
"""

import logging
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed
from ldm.config import instantiate
from ldm.engine import distributed
from ldm.engine.device import device_of, keep_freed_memory, set_matmul_precision
from ldm.engine.signals import stop_at_once
from ldm.errors import UserError
from ldm.runs.options import parse
from ldm.runs.run import base_files, load_base
from ldm.runs.sampling import generate_priors, prior_set, text2image
from ldm.runs.validate import validate
from ldm.schema import RunConfig


def main(config: RunConfig) -> list[Path]:
    """Generates the missing images -> the folders of the sets, one for each class."""
    keep_freed_memory()
    trainer = distributed.join(config.trainer)
    validate(replace(config, trainer=trainer))
    data = instantiate(config.data)
    if not config.is_dreambooth or not data.generated_classes:
        raise UserError("This config has no prior images to generate", where="data.params.num_priors")
    module = instantiate(config.model)
    base_hash = load_base(
        module.networks, base_files(config), parameterization=module.process.parameterization
    )
    set_matmul_precision(config.matmul_precision)
    module.to(device_of(trainer))
    sampling = config.priors
    pipeline = text2image(module, size=data.size)
    about = {"base_sha256": base_hash, "size": data.size}
    about |= {"device": module.device, "unconditional": pipeline.text_encoder.unconditional}
    sets = [prior_set(known.prompt, sampling, **about) for known in data.generated_classes]
    for priors in sets:
        missing = generate_priors(pipeline, priors, data.num_priors, batch_size=sampling.batch_size)
        if distributed.rank() == 0:
            print(f"{missing} generated, {data.num_priors - missing} were there")
    return [priors.folder for priors in sets]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    stop_at_once()
    try:
        config = parse(sys.argv[1:], description=__doc__)
        distributed.launch(config.trainer)
        folders = main(config)
        if distributed.rank() == 0:
            print(*folders, sep="\n")
        distributed.leave()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

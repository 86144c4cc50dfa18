"""The prior images of a config, and nothing else: what `generate_priors.py` does."""

from dataclasses import replace
from pathlib import Path

from ldm.engine import distributed
from ldm.engine.device import device_of, keep_freed_memory, set_matmul_precision
from ldm.errors import UserError
from ldm.model_file import use_device
from ldm.runs.sampling import generate_priors, prior_sets, text2image
from ldm.runs.untrained import load_untrained
from ldm.runs.validate import validate
from ldm.schema import RunConfig


def generate_set(config: RunConfig) -> list[Path]:
    """Generates the missing images -> the folders of the sets, one for each class and bucket."""
    keep_freed_memory()
    trainer = distributed.join(config.trainer)
    data = validate(replace(config, trainer=trainer))
    use_device(device_of(trainer))
    if not config.is_dreambooth or not data.generated_classes:
        raise UserError("This config has no prior images to generate", where="data.params.num_priors")
    module, base_hash = load_untrained(config)
    set_matmul_precision(config.matmul_precision)
    module.to(device_of(trainer))
    sampling = config.priors
    pipeline = text2image(module, size=data.size)
    sets = prior_sets(module, data, sampling, base_sha256=base_hash)
    for priors in sets:
        count = data.prior_counts[priors.spec.shape]
        missing = generate_priors(pipeline, priors, count, batch_size=sampling.batch_size)
        if distributed.rank() == 0:
            print(f"{missing} generated, {count - missing} were there")
    return [priors.folder for priors in sets]

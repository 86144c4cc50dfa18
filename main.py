"""The whole job from one config: `python main.py --base configs/dreambooth.yaml [more.yaml] [key.sub=value]`."""

import argparse
import sys
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger

from ldm import config as configs
from ldm.checkpoints.save import DTYPES
from ldm.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", "-b", nargs="+", required=True)
    options, dotlist = parser.parse_known_args()
    dotlist = [word for word in options.base + dotlist if "=" in word]
    config = configs.load_config([word for word in options.base if "=" not in word], dotlist)
    plain = configs.to_plain(config)
    folder = Path("logs") / plain["name"]
    folder.mkdir(parents=True, exist_ok=True)
    configs.save_config(config, folder / "config.yaml")
    pl.seed_everything(plain["seed"], verbose=False)
    module = configs.instantiate(plain["model"])
    data = configs.instantiate(plain["data"])
    if base := plain.get("base_checkpoint"):
        from ldm.checkpoints.load import file_hash, load_parts, read_checkpoint
        from ldm.checkpoints.layout import split
        parts = split(read_checkpoint(base)[0])
        names = plain.get("base_parts") or list(module.networks)
        load_parts({n: module.networks[n] for n in names}, {n: parts[n] for n in names}, where=base)
        data.attach(encode=module.encode_images, vae_hash=file_hash(base))
    last = folder / "checkpoints" / "last.ckpt"
    if last.exists():
        import torch
        data.start_step = torch.load(last, map_location="cpu", weights_only=True)["global_step"]
        print("resume at", data.start_step)
    callbacks = [ModelCheckpoint(folder / "checkpoints", every_n_train_steps=plain.get("checkpoint_every", 250), save_last=True, save_top_k=1, enable_version_counter=False)]
    if plain.get("ema_decay"):
        from pytorch_lightning.callbacks import EMAWeightAveraging
        callbacks.append(EMAWeightAveraging(decay=plain["ema_decay"], update_starting_at_step=200))
    trainer = pl.Trainer(
        default_root_dir=folder, logger=TensorBoardLogger(folder, name="", version="tensorboard"), callbacks=callbacks,
        num_sanity_val_steps=0, use_distributed_sampler=False, enable_model_summary=False, **plain["trainer"])
    trainer.fit(module, data, ckpt_path=str(last) if last.exists() else None)
    print(module.export(folder / "model.safetensors", dtype=DTYPES[plain["export"]["dtype"]], metadata={}))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

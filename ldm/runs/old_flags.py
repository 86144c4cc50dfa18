"""Flags of other DreamBooth tools -> what is written here (docs/from_other_tools.md)."""

from collections.abc import Mapping

OBJECTIVE, TRAINABLE = "model.params.objective", "model.params.trainable"
MIN_SNR = "{target: ldm.training.objective.MinSNR}"
STEPS = "trainer.max_steps=800"
WITH_LORA = ", over the preset configs/presets/8gb-lora.yaml"
RUNS = "Take it off: runs are kept in logs/ of the folder in which the command is started"

OVERRIDES = {  # flag -> the override in its place, of the same meaning
    "--gpus": "trainer.devices=1",
    "--max_epochs": STEPS,
    "--max_train_steps": STEPS,
    "--max_train_epochs": STEPS,
    "--num_train_epochs": STEPS,
    "--scale_lr": f"{TRAINABLE}.learning_rate=1e-6",
    "--learning_rate": f"{TRAINABLE}.learning_rate=2e-6",
    "--unet_lr": f"{TRAINABLE}.learning_rate=1e-4",
    "--text_encoder_lr": f"{TRAINABLE}.text_encoder_learning_rate=1e-5",
    "--learning_rate_te": f"{TRAINABLE}.text_encoder_learning_rate=1e-6",
    "--train_text_encoder": f"{TRAINABLE}.text_encoder=true",
    "--stop_text_encoder_training": f"{TRAINABLE}.text_encoder_steps=400",
    "--instance_prompt": "data.params.subject_prompt='a photo of {identifier} {class_word}'",
    "--class_prompt": "data.params.prior_prompt='a photo of a {class_word}'",
    "--with_prior_preservation": "data.params.num_priors=200",
    "--num_class_images": "data.params.num_priors=200",
    "--prior_loss_weight": f"{OBJECTIVE}.prior_loss_weight=1.0",
    "--snr_gamma": f"{OBJECTIVE}.weighting={MIN_SNR}",
    "--min_snr_gamma": f"{OBJECTIVE}.weighting={MIN_SNR}",
    "--noise_offset": "model.params.process.offset_noise=0.1",
    "--offset_noise": "model.params.process.offset_noise=0.1",
    "--zero_terminal_snr": "model.params.process.zero_terminal_snr=true",
    "--v_parameterization": "model.params.process.parameterization=v",
    "--enable_bucket": "data.params.buckets={}",
    "--bucket_reso_steps": "data.params.buckets.unit=64",
    "--min_bucket_reso": "data.params.buckets.min_side=256",
    "--max_bucket_reso": "data.params.buckets.max_side=1024",
    "--resolution": "data.params.size=512",
    "--center_crop": "data.params.crop=center",
    "--random_crop": "data.params.crop=random",
    "--train_batch_size": "data.params.batch_size=1",
    "--sample_batch_size": "priors.batch_size=4",
    "--cache_latents": "data.params.cache_latents=true",
    "--flip_aug": "data.params.flip=true",
    "--gradient_accumulation_steps": "trainer.accumulate_grad_batches=1",
    "--gradient_checkpointing": "model.params.unet.params.use_checkpoint=true",
    "--max_grad_norm": "trainer.gradient_clip_val=1.0",
    "--use_8bit_adam": "model.params.optimizer=adamw_8bit",
    "--mixed_precision": "trainer.precision=bf16-mixed",
    "--checkpointing_steps": "checkpoint_every=250",
    "--save_every_n_steps": "checkpoint_every=250",
    "--validation_prompt": "samples.prompts=['a photo of {identifier} {class_word}']",
    "--num_validation_images": "samples.n=4",
    "--validation_epochs": "samples.every_steps=100",
    "--sample_every_n_steps": "samples.every_steps=100",
    "--report_to": "logger.target=pytorch_lightning.loggers.WandbLogger",
    "--log_with": "logger.target=pytorch_lightning.loggers.WandbLogger",
    "--rank": f"{TRAINABLE}.lora.params.rank=16",
    "--network_dim": f"{TRAINABLE}.lora.params.rank=16",
    "--network_alpha": f"{TRAINABLE}.lora.params.alpha=16",
}
FLAGS = {  # flag -> the flag of ours in its place
    "--pretrained_model_name_or_path": "--actual_resume MODEL",
    "--instance_data_dir": "--data_root PHOTOS",
    "--train_data_dir": "--data_root PHOTOS",
    "--class_data_dir": "--reg_data_root FOLDER",
    "--reg_data_dir": "--reg_data_root FOLDER",
    "--output_dir": "--name NAME",
    "--output_name": "--name NAME",
    "--resume_from_checkpoint": "--resume NAME",
    "--init_word": "--class_word WORD",
    "--network_module": "--base CONFIG configs/presets/8gb-lora.yaml",
    "--config_file": "--base CONFIG",
}
SENTENCES = {
    **dict.fromkeys(("-t", "--train"), "Take it off: a run always trains"),
    "--no-test": "Take it off: a run has no test phase",
    **dict.fromkeys(("-l", "--logdir", "--logging_dir"), RUNS),
    **dict.fromkeys(("-d", "--debug", "-p", "--project"), "Take it off"),
    "--xformers": "Take it off: the attention is torch's own",
    "--enable_xformers_memory_efficient_attention": "Take it off: the attention is torch's own",
}


def remedies() -> Mapping[str, str]:
    """Flag -> what is written in its place, as a sentence."""
    written = {flag: f"Write `{instead}`" for flag, instead in (OVERRIDES | FLAGS).items()}
    lora = {flag: written[flag] + WITH_LORA for flag in ("--rank", "--network_dim", "--network_alpha")}
    return {flag: f"{sentence}." for flag, sentence in (written | lora | SENTENCES).items()}


def remedy_for(flag: str) -> str | None:
    """What is written here for a flag (`--x`, `--x=1`) of another tool; None for an unknown one."""
    return remedies().get(flag.partition("=")[0])

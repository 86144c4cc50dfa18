"""Keys of `LatentDiffusion` that have moved into its sections, for the message that tells their new place."""

from collections.abc import Mapping
from dataclasses import fields

from ldm.diffusion.process import ProcessConfig

MOVED: Mapping[str, str] = {  # key of model.params -> what is written in its place, beside it
    **{field.name: f"process.{field.name}" for field in fields(ProcessConfig)},
    "train_unet": "trainable.unet",
    "train_text_encoder": "trainable.text_encoder",
    "text_encoder_steps": "trainable.text_encoder_steps",
    "learning_rate": "trainable.learning_rate",
    "text_encoder_learning_rate": "trainable.text_encoder_learning_rate",
    "lora": "trainable.lora",
    "learned_token": "trainable.learned_token",
    "new_word": "trainable.learned_token",
    "fused_backward": "optimizer={target: ldm.optim.fused_backward.FusedBackward}",
    "step_in_backward": "optimizer={target: ldm.optim.fused_backward.FusedBackward}",
    "betas": "optimizer={target: torch.optim.AdamW, params: {betas: [0.9, 0.999]}}",
    "weight_decay": "optimizer={target: torch.optim.AdamW, params: {weight_decay: 0.01}}",
    "warmup_steps": "lr_schedule={target: ldm.optim.schedules.Constant, params: {warmup_steps: 9}}",
    "prior_loss_weight": "objective.prior_loss_weight",
    "prior_target": "objective.prior_target",
    "l2_sp_weight": "objective.l2_sp_weight",
    "l2_pull": "objective.l2_sp_weight",
    "min_snr_gamma": "objective.weighting={target: ldm.training.objective.MinSNR, params: {gamma: 5}}",
    "min_snr_floor": "objective.weighting={target: ldm.training.objective.MinSNR, params: {floor: 1}}",
}

"""Finds the key that somebody meant who wrote one that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

# Keys by the names that they have elsewhere: in diffusers' scripts, guided-diffusion, EDM, k-diffusion, papers.
ELSEWHERE = {
    "train.steps": "max_steps max_train_steps num_steps total_steps iterations iters num_iterations max_iter epochs "
    "num_epochs num_train_epochs n_epochs duration",
    "train.batch_size": "bs batch train_batch_size batch_per_gpu batch_gpu microbatch per_device_train_batch_size",
    "train.gradient_accumulation": "accumulation grad_accum accumulate gradient_accumulation_steps accum_steps "
    "accumulate_grad_batches grad_accumulation",
    "train.learning_rate": "lr rate base_lr max_lr learning_rates",
    "train.learning_rate_schedule": "lr_scheduler lr_schedule lr_scheduler_type lr_decay",
    "train.warmup_steps": "warmup lr_warmup_steps lr_warmup lr_rampup num_warmup_steps",
    "train.learning_rate_cycles": "num_cycles lr_num_cycles cycles restarts",
    "train.learning_rate_power": "lr_power",
    "train.learning_rate_rules": "step_rules lr_step_rules milestones",
    "optimizer.name": "optim optimizer_type optimizer_name optim_type opt use_8bit_adam",
    "optimizer.eps": "adam_epsilon epsilon",
    "optimizer.momentum": "sgd_momentum muon_momentum",
    "train.weight_decay": "wd decay adam_weight_decay",
    "train.betas": "adam_betas adam_beta1 adam_beta2 beta1 beta2",
    "train.max_gradient_norm": "clip grad_clip max_grad_norm gradient_clip clip_grad_norm gradient_clip_val",
    "train.mixed_precision": "precision amp fp16 bf16 use_fp16 dtype",
    "train.initial_weights": "pretrained pretrained_model_name_or_path init_from finetune finetune_from weights ckpt",
    "train.processes": "gpus devices num_gpus world_size num_processes nproc",
    "train.log_every": "log_interval log_steps logging_steps log_every_n_steps",
    "train.profile": "profiler profile_steps profiling",
    "train.validate_every": "eval_every val_every validation_steps eval_steps eval_interval val_check_interval",
    "train.trackers": "tracker logger report_to log_with wandb tensorboard",
    "train.compile": "torch_compile use_compile",
    "ema.decay": "ema_decay ema_rate ema_beta ema_max_decay",
    "checkpoint.every": "save_every save_interval save_steps checkpointing_steps ckpt_every snapshot checkpoint_every",
    "checkpoint.keep": "save_total_limit checkpoints_total_limit save_top_k keep_last",
    "preview.every": "sample_every sample_interval save_images_epochs image_every",
    "preview.count": "num_samples n_samples eval_batch_size num_images",
    "preview.steps": "num_inference_steps sampling_steps ddim_steps sampling_timesteps",
    "preview.guidance_scale": "cfg cfg_scale guidance guidance_weight scale",
    "preview.scheduler": "sampler noise_scheduler",
    "objective.num_train_timesteps": "timesteps num_timesteps diffusion_steps ddpm_num_steps noise_levels t",
    "objective.schedule": "noise_schedule beta_schedule ddpm_beta_schedule schedule_name",
    "objective.prediction_type": "parameterization pred_type predict prediction mean_type learn_sigma predict_xstart",
    "objective.min_snr_gamma": "snr_gamma gamma",
    "objective.weighting": "loss_weighting loss_weight min_snr loss_type",
    "objective.label_dropout": "class_dropout class_dropout_prob cond_drop_prob uncond_prob p_uncond cfg_dropout "
    "conditioning_dropout_prob null_prob drop_label",
    "objective.clip_sample": "clip_denoised",
    "data.path": "dataset data_dir dataset_name train_data_dir root folder dataset_path image_dir data_path",
    "data.name": "type dataset_type kind",
    "data.image_size": "resolution size img_size imagesize image_resolution res crop_size",
    "data.num_workers": "workers dataloader_num_workers num_loader_workers n_workers",
    "data.random_flip": "flip hflip horizontal_flip mirror xflip random_horizontal_flip augment",
    "data.random_crop": "crop center_crop",
    "data.held_out": "val_split validation_split val_fraction test_size holdout",
    "data.image_column": "image_key image_field",
    "data.label_column": "label_key class_column label_field",
    "data.shuffle_buffer": "buffer_size shuffle shuffle_size",
    "model.sample_size": "input_size",
    "model.channels": "block_out_channels channel_mult dim_mults model_channels num_channels base_channels ch ch_mult "
    "dim width widths hidden_size features",
    "model.depth": "num_res_blocks layers_per_block num_blocks n_res_blocks blocks",
    "model.attention_levels": "attention_resolutions attn_resolutions attention attn_levels",
    "model.num_classes": "classes n_classes label_dim class_cond num_class_embeds nb_classes",
    "model.in_channels": "in_ch channels_in input_channels img_channels image_channels num_input_channels",
    "model.out_channels": "out_ch channels_out output_channels out_dim",
    "model.dropout": "drop drop_rate dropout_rate",
    "model.norm.num_groups": "groups norm_num_groups resnet_groups gn_groups",
    "model.attention.num_heads": "heads num_heads n_heads num_attention_heads",
    "model.attention.head_dim": "attention_head_dim num_head_channels dim_head",
    "model.transformer.context_dim": "cross_attention_dim context_channels",
    "model.transformer.depth": "transformer_layers_per_block transformer_depth",
    "seed": "random_seed manual_seed rng_seed",
}
KEY_OF = {alias: key for key, aliases in ELSEWHERE.items() for alias in aliases.split()}


def nearest_key(name: str, known: Sequence[str]) -> str | None:
    """Find the one of the known dotted keys that an unknown one means; None where nothing is near.

    It is, in this order: a key of that last name in another group; what other projects call so; a last name that is
    spelt alike, the same group first; a whole name that is spelt alike.
    """
    group, _, last = name.replace("-", "_").rpartition(".")
    moved = [key for key in known if key.rpartition(".")[2] == last]
    if moved:
        return next((key for key in moved if key.startswith(f"{group}.")), moved[0])
    alias = KEY_OF.get(last.lower(), "")
    if alias in known:
        return alias

    def likeness(key: str) -> float:
        own_group, _, own = key.rpartition(".")
        return difflib.SequenceMatcher(None, last.lower(), own).ratio() + 0.1 * (bool(group) and own_group == group)

    best = max(known, key=likeness)
    if likeness(best) >= 0.7:
        return best
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.7)), None)

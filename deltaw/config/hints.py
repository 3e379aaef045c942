"""Words that other tools have for a setting, and what they are called here.

Who comes from Axolotl, Unsloth, TRL, PEFT, LLaMA-Factory, mlx-lm or torchtune writes that tool's words first. Each is
answered by the setting of ours that it means (`MEANT`), with a few words where the two don't count the same
(`EXPLAINED`), or by the reason why there is none and what to do instead (`WITHOUT`). Values of theirs are in `VALUES`.

This is advice in an error and nothing else. Rejected: taking their words as ours (two ways to write one thing, and a
batch of 4 rows isn't one of 4 tokens).

A test holds every setting that is named here to the run file.
"""

import difflib
from typing import Any

MEANT = {  # ours: theirs
    "base": "base_model model model_name model_id model_path model_name_or_path base_model_name_or_path "
    "pretrained_model_name_or_path pretrained_model base_model_id",
    "output": "output_dir output_path out_dir save_dir save_path adapter_path checkpoint_dir logging_dir run_name",
    "adapter": "lora peft lora_config peft_config lora_parameters lora_args adapter_config",
    "adapter.from": "lora_model_dir resume_adapter_file adapter_name_or_path peft_path",
    "adapter.rank": "r lora_r lora_rank lora_dim peft_r",
    "adapter.alpha": "lora_alpha peft_alpha",
    "adapter.targets": "target_modules lora_target_modules lora_target lora_targets lora_target_linear "
    "lora_attn_modules apply_lora_to_mlp lora_keys",
    "adapter.dropout": "lora_dropout lora_dropout_p",
    "adapter.init": "init_lora_weights pissa_init",
    "adapter.magnitude": "use_dora dora peft_use_dora",
    "adapter.scaling": "use_rslora rslora peft_use_rslora",
    "adapter.rank_overrides": "rank_pattern",
    "adapter.alpha_overrides": "alpha_pattern",
    "adapter.tokens": "trainable_token_indices trainable_tokens new_special_tokens add_tokens added_tokens "
    "additional_special_tokens",
    "adapter.also": "modules_to_save lora_modules_to_save additional_target unfrozen_parameters "
    "embedding_learning_rate train_embeddings",
    "data": "dataset_config data_args data_arguments",
    "data.train": "datasets dataset dataset_path dataset_name dataset_dir data_path data_file data_files train_file "
    "train_data train_dataset training_data",
    "data.eval": "val_set_size val_size val_split val_file val_data eval_split eval_dataset eval_file eval_data "
    "test_file test_datasets validation_file validation_split valid_file",
    "data.max_length": "max_seq_length max_seq_len sequence_len sequence_length cutoff_len max_len model_max_length "
    "context_length block_size",
    "data.limit": "max_samples max_train_samples num_samples",
    "data.train_on": "train_on_inputs train_on_input train_on_prompt train_on_responses_only mask_prompt "
    "completion_only_loss assistant_only_loss roles_to_train",
    "data.template": "chat_template chat_template_jinja",
    "data.form": "dataset_type dataset_format chat_format",
    "data.columns": "column_mapping column_names field_mapping prompt_feature completion_feature chat_feature "
    "text_feature dataset_text_field text_field text_column prompt_field completion_field prompt_column "
    "response_column question_column answer_column field_instruction field_output field_input field_system "
    "field_messages messages_field",
    "objective": "rl dpo kto orpo ipo simpo grpo pref_loss dpo_config kto_config grpo_config",
    "objective.kind": "loss_type rl_type",
    "objective.beta": "dpo_beta kto_beta orpo_beta pref_beta orpo_alpha",
    "objective.gamma": "simpo_gamma",
    "objective.sft_weight": "rpo_alpha cpo_alpha pref_ftx",
    "objective.desirable_weight": "kto_desirable_weight kto_chosen_weight",
    "objective.undesirable_weight": "kto_undesirable_weight kto_rejected_weight",
    "objective.reward": "reward_funcs reward_function reward_functions reward_fn reward_func rewards",
    "objective.samples": "num_generations group_size num_rollouts_per_prompt n_samples_per_prompt rollout_n",
    "objective.prompts": "prompts_per_step rollout_batch_size groups_per_batch",
    "objective.max_new_tokens": "max_completion_length response_length max_response_length",
    "objective.temperature": "sampling_temperature",
    "objective.epsilon_low": "epsilon clip_ratio clip_ratio_low cliprange",
    "objective.epsilon_high": "clip_ratio_high",
    "objective.scale": "scale_rewards norm_adv_by_std_in_grpo",
    "objective.mask_truncated": "mask_truncated_completions",
    "train": "training_arguments training_args trainer sft_config optimization",
    "train.lr": "learning_rate lr_rate base_lr",
    "train.lr_ratio_b": "loraplus_lr_ratio",
    "train.epochs": "num_train_epochs num_epochs epoch n_epochs max_epochs",
    "train.steps": "max_steps iters max_iters num_steps num_iters max_train_steps total_steps num_train_steps",
    "train.schedule": "lr_scheduler_type lr_scheduler lr_schedule scheduler scheduler_type",
    "train.warmup_steps": "warmup warmup_iters num_warmup_steps lr_warmup_steps",
    "train.weight_decay": "adam_weight_decay wd",
    "train.clip": "max_grad_norm gradient_clipping gradient_clip_val grad_clip clip_grad_norm grad_norm",
    "train.seed": "random_seed random_state data_seed",
    "train.dtype": "bf16 fp16 tf32 bfloat16 float16 torch_dtype precision mixed_precision compute_dtype pure_bf16",
    "train.device": "device_map accelerator",
    "train.save_every": "save_steps save_interval checkpointing_steps",
    "train.patience": "early_stopping_patience early_stopping early_stop_patience",
    "train.log_to": "report_to wandb use_wandb wandb_project wandb_name wandb_run_name wandb_entity logger loggers "
    "log_with tensorboard use_tensorboard metric_logger",
    "train.keep": "save_total_limit",
    "evaluate": "evaluation eval_args",
    "evaluate.metrics": "compute_metrics metric metric_for_best_model",
}
EXPLAINED = (  # ours, how theirs differs, theirs
    (
        "train.tokens_per_batch",
        "a batch is counted in tokens here: 4 rows of 512 are 2048",
        "micro_batch_size per_device_train_batch_size per_device_eval_batch_size train_batch_size eval_batch_size "
        "batch_size",
    ),
    (
        "train.tokens_per_step",
        "a step is counted in tokens here, in as many batches as they need: 16 rows of 512 are 8192",
        "gradient_accumulation_steps grad_accumulation_steps gradient_accumulation global_batch_size "
        "effective_batch_size total_batch_size",
    ),
    (
        "train.checkpointing",
        "none, blocks or offload; left out, it is chosen where memory is short",
        "gradient_checkpointing grad_checkpoint use_gradient_checkpointing gradient_checkpointing_kwargs "
        "enable_activation_checkpointing activation_checkpointing enable_activation_offloading activation_offloading",
    ),
    ("train.warmup_steps", "in steps; left out, it fits the run's length", "warmup_ratio"),
    (
        "train.eval_every",
        "in steps",
        "eval_steps steps_per_eval eval_interval eval_strategy evaluation_strategy evals_per_epoch do_eval",
    ),
    ("train.save_every", "in steps", "save_strategy saves_per_epoch"),
    (
        "adapter.targets",
        "layers are chosen there, too: [layers.16-] or [all-linear, not layers.0-7]",
        "layers_to_transform layers_pattern peft_layers_to_transform num_layers lora_layers lora_num_layers "
        "exclude_modules target_layers freeze_trainable_layers",
    ),
)
GPUS = "several GPUs or machines: torchrun --nproc-per-node N -m deltaw train run.yaml; leave it out"
QUANTISED = "write base_weights: nf4 (or int8) at the top of the run file: the base is quantised as it is loaded"
EIGHT = "write base_weights: int8 at the top of the run file: the base is quantised as it is loaded"
WITHOUT = (  # what to do instead, theirs
    (
        QUANTISED,
        "load_in_4bit quantization quantization_bit quantization_config quantization_method quantize bits bnb_config "
        "qlora",
    ),
    (EIGHT, "load_in_8bit int8_training"),
    ("base_weights: nf4 has double quantisation, and products in train.dtype: leave it out", "bnb_4bit_compute_dtype "
     "bnb_4bit_quant_type bnb_4bit_use_double_quant double_quant"),
    ("not supported; base_weights: nf4 quantises the base as it is loaded", "gptq loftq loftq_config use_qalora"),
    ("the optimiser is always AdamW: leave it out", "optim optimizer optimizer_type optimizer_config adam_beta1 "
     "adam_beta2 adam_epsilon betas"),
    ("every step is logged, in metrics.jsonl: leave it out", "logging_steps steps_per_report log_every_n_steps "
     "logging_first_step logging_strategy log_interval"),
    ("the kernels are chosen for the model and the machine: leave it out", "flash_attention flash_attn "
     "use_flash_attention_2 use_flash_attn attn_implementation xformers_attention sdp_attention liger use_liger_kernel "
     "enable_liger_kernel torch_compile compile unsloth use_unsloth lora_mlp_kernel lora_qkv_kernel lora_o_kernel"),
    ("documents are always packed, and none sees another: leave it out", "packing packed sample_packing neat_packing "
     "eval_packing eval_sample_packing pad_to_sequence_len group_by_length padding padding_free"),
    ("rows are always shuffled, by train.seed: leave it out", "shuffle shuffle_seed shuffle_dataset"),
    (GPUS, "deepspeed fsdp fsdp_config fsdp_version ddp ddp_timeout num_gpus n_gpu world_size num_processes local_rank "
     "tensor_parallel_size context_parallel_size"),
    ("biases aren't trained: leave it out", "bias lora_bias"),
    ("noise on the embeddings isn't supported; against overfitting: fewer epochs, or adapter.dropout",
     "neftune_noise_alpha neftune"),
    ("write it into the rows, as a message of the role system", "system_prompt system_message system default_system"),
    ("the base's folder says it: leave it out", "tokenizer tokenizer_type tokenizer_name tokenizer_config model_type "
     "processor_type special_tokens pad_token use_fast_tokenizer config_name"),
    ("a LoRA is trained unless adapter says otherwise (adapter: full): leave it out", "finetuning_type fine_tune_type "
     "peft_type task_type sft_type use_peft train_type do_train stage"),
    ("a reward's function may ask a model: objective: {kind: grpo, reward: judge.py:score}", "reward_model "
     "reward_model_path ppo ppo_config reward_weights"),
    ("one update per rollout: leave it out", "num_iterations steps_per_generation ppo_epochs"),
    ("the adapter's own engine samples, in this process: leave it out", "use_vllm vllm vllm_mode "
     "vllm_gpu_memory_utilization"),
    ("the reference is the base with the adapter off, or the adapter.from that a run begins with: leave it out",
     "ref_model reference_model ref_model_name precompute_ref_log_probs precompute_ref_batch_size sync_ref_model"),
    ("code from a model's folder never runs: leave it out", "trust_remote_code"),
    ("leave it out: rows are read and packed in the same process", "dataloader_num_workers num_workers "
     "dataset_num_proc preprocessing_num_workers dataset_prepared_path overwrite_cache"),
    ("a run is resumed by its folder: deltaw train RUN; leave it out", "resume resume_from_checkpoint "
     "auto_resume_from_checkpoints"),
    ("a folder is replaced on request: deltaw train run.yaml --replace", "overwrite_output_dir"),
    ("after training: deltaw export RUN --to peft -o FOLDER --push org/name", "push_to_hub hub_model_id hub_token "
     "hub_private_repo hub_strategy"),
    ("after training: deltaw merge RUN -o FOLDER, or deltaw export RUN --to gguf -o FOLDER", "merge merge_lora "
     "merge_adapter save_merged save_method export export_gguf gguf quantization_type fuse"),
)  # fmt: skip
VALUES: dict[str, dict[Any, str]] = {  # a setting: its value elsewhere: what to write
    "adapter": {
        "lora": "a LoRA is what is trained: write {rank: 16}, or leave adapter out",
        "dora": "write {magnitude: true}",
        "qlora": "write base_weights: nf4 at the top of the run file; the adapter is a LoRA",
    },
    "base_weights": {
        **dict.fromkeys(("4bit", "4-bit", "int4", "fp4", "q4", "qlora", True), "write nf4"),
        **dict.fromkeys(("8bit", "8-bit", "q8", "fp8"), "write int8"),
        **dict.fromkeys(("bf16", "half", "16bit"), "write bfloat16"),
        **dict.fromkeys(("none", "float32", "fp32", "full", False), "write auto, and train.dtype: float32"),
    },
    "adapter.init": dict.fromkeys((True, "default", "gaussian", "kaiming"), "write lora"),
    "adapter.scaling": {True: "write rslora", False: "write lora"},
    "data": {str: "write {train: FILE}"},
    "data.train_on": {True: "write all", False: "write assistant or completion", "inputs": "write all"},
    "train": {bool: "write {epochs: 1}, or leave train out"},
    "train.dtype": {
        **dict.fromkeys(("bf16", True), "write bfloat16"),
        **dict.fromkeys(("fp16", "half"), "write float16, or bfloat16 where the machine has it"),
        **dict.fromkeys(("fp32", "float", False), "write float32"),
    },
    "train.checkpointing": {True: "write blocks", False: "write none", "unsloth": "write offload"},
    "train.schedule": {
        **dict.fromkeys(("cosine_with_restarts", "cosine_annealing", "cosine_decay"), "write cosine"),
        "constant_with_warmup": "write constant: a warm-up comes with each",
    },
}


_FIELD = {word: field for field, words in MEANT.items() for word in words.split()}
_FIELD |= {word: field for field, _, words in EXPLAINED for word in words.split()}
_NOTES = {word: note for _, note, words in EXPLAINED for word in words.split()}
_WITHOUT = {word: note for note, words in WITHOUT for word in words.split()}


def of_word(word: str, section: str = "", *, slips: bool = True) -> str | None:
    """What to say of an unknown key `word` in `section` ("" is the top of the run file); None where nothing is known.
    `slips`: a misspelt word is recognised, too."""
    word = word.lower().replace("-", "_")
    known = [*_FIELD, *_WITHOUT]
    if word not in known:
        near = difflib.get_close_matches(word, known, n=1, cutoff=0.87) if slips and len(word) > 5 else []
        if not near:
            return None
        (word,) = near
    if word in _WITHOUT:
        return _WITHOUT[word]
    note = f"; {_NOTES[word]}" if word in _NOTES else ""
    return f"did you mean {in_section(_FIELD[word], section)!r}?" + note


def named_here(word: str) -> str | None:
    """The setting that another tool calls `word`, to the letter."""
    return _FIELD.get(word.lower().replace("-", "_"))


def of_value(field: str, value: Any) -> str | None:
    """What to write instead of another tool's `value` of a setting."""
    known = VALUES.get(field, {})
    key = value.lower() if isinstance(value, str) else value
    if not isinstance(key, str | bool):
        return None
    return next((said for one, said in known.items() if type(one) is type(key) and one == key), known.get(type(key)))


def in_section(field: str, section: str) -> str:
    """A setting as it is called in `section`: `lr` in `train`, `train.lr` anywhere else."""
    return field.removeprefix(section + ".") if section else field

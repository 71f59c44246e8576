"""The settings of a short distillation, for the command line and for Python: 2 layers, 4 rows, 5 updates."""

SETTINGS = {
    "num_inference_steps": 2,
    "train_batch_size": 4,
    "max_train_steps": 5,
    "critic_updates": 2,
    "checkpointing_steps": 2,
    "lr_warmup_steps": 4,
    "validation_steps": 0,
}

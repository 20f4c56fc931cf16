"""Checkpoints as trainers write them (torch.save, DeepSpeed, FSDP), read by rows and without running any code."""

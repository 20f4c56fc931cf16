"""The sources of models: the Hugging Face Hub, the inbox of fine-tunes, and directories to open."""

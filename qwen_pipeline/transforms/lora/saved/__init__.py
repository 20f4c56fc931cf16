"""What trainers save beside and instead of PEFT's own files: shards, other spellings of names, other layouts."""

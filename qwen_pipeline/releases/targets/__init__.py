"""Places that promoted releases are delivered to: directories, object storage, and repositories of Hugging Face."""

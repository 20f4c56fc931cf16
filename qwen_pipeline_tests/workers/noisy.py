"""What says that it was imported."""

print("imported", flush=True)

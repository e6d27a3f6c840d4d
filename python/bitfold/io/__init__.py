"""Files: atomic replacement, safetensors read with doubt and written as a stream. Of tensors, not models."""

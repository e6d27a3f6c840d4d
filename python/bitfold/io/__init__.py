"""Files: atomic replacement, safetensors read with doubt and written as a stream. Knows tensors, no models."""

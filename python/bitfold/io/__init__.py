"""Files: atomic replacement, streamed safetensors shards, checkpoints of plain torch models, verification of
exports.
"""
